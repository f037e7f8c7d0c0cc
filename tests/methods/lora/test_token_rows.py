"""Rows of chosen tokens train beside the adapters: PEFT's gradients, PEFT's file, and a merge that is the model."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from little_trainer import assert_same, trainer
from lorafit.backbone import fresh_weights, load_backbone
from lorafit.config import RunConfig
from lorafit.data import token_ids
from lorafit.engine import keep_embeddings_on_host
from lorafit.engine.loss.logit_rules import logit_steps
from lorafit.engine.loss.vocabulary import chunked_loss
from lorafit.errors import AdapterError, UsageError
from lorafit.hardware import hardware_named
from lorafit.memory.inputs import DataStats, PlanInputs
from lorafit.methods import METHODS
from lorafit.methods.lora import Deltas, attach, count_parameters
from lorafit.shapes import ModelShape
from stirred import assert_learns_alike, plain_model, stirred
from tiny_models import save_base, some_ids

LORA = METHODS["lora"]
TOKENS = ("<|user|>", "<|eos|>")
FAMILIES = ("llama", "llama-tied", "gemma3_text")


def settings(base, **given):
    return RunConfig(
        **{"base": str(base), "trainable_tokens": TOKENS, "dropout": 0.0, "rank": 4, "alpha": 8.0, **given}
    )


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return {family: save_base(tmp_path_factory.mktemp(family), family) for family in FAMILIES}


def ids_with_the_tokens():
    ids = some_ids().clone()
    ids[0, 1], ids[0, 4], ids[0, 5] = 3, 2, 3
    return ids


def answers(model):
    with torch.no_grad():
        return model.eval()(ids_with_the_tokens()).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_pefts(bases, family):
    config = settings(bases[family], quantization="none")
    ours = stirred(attach(load_backbone(config), config))
    modules = {"embed_tokens": [3, 2]} | ({"lm_head": [3, 2]} if family == "llama" else {})
    same = LoraConfig(r=4, lora_alpha=8.0, target_modules=["q_proj", "v_proj"], trainable_token_indices=modules)
    theirs = get_peft_model(load_backbone(config), same)
    assert_learns_alike(
        ours,
        theirs,
        ids_with_the_tokens(),
        lambda name: name.replace(".token_adapter.trainable_tokens_delta.default", ".token_rows"),
    )


def test_the_loss_in_chunks_has_the_same_gradient(bases):
    config = settings(bases["llama-tied"])
    model = stirred(attach(load_backbone(config), config))
    rows = model.get_base_model().lm_head.token_rows
    ids = ids_with_the_tokens()
    whole = model(input_ids=ids, labels=ids).loss
    (wanted,) = torch.autograd.grad(whole, rows)
    hidden = model.get_base_model().model(ids).last_hidden_state[0, :-1]
    head, steps = model.get_base_model().lm_head, logit_steps(model.get_base_model().config)
    chunked = chunked_loss(hidden, ids[0, 1:], head, steps, chunk_rows=4, share=1 / (ids.shape[1] - 1))
    torch.testing.assert_close(chunked, whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.autograd.grad(chunked, rows)[0], wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("family", "quantization"), [("llama", "nf4"), ("llama-tied", "nf4"), ("gemma3_text", "none")])
def test_the_merge_and_plain_peft_are_the_live_model(bases, tmp_path, family, quantization):
    config, folder = settings(bases[family], quantization=quantization), tmp_path / "adapter"
    live = stirred(attach(load_backbone(config), config))
    wanted = answers(live)
    with LORA.without(live):
        assert torch.equal(answers(live), answers(load_backbone(config)))
    LORA.save(live, folder, config)
    torch.testing.assert_close(answers(LORA.load(load_backbone(config), folder, config)), wanted, rtol=0, atol=0)
    theirs = PeftModel.from_pretrained(plain_model(config), folder)
    torch.testing.assert_close(answers(theirs), wanted, rtol=1e-4, atol=1e-4)
    merged, deltas = plain_model(config), Deltas.from_folder(folder, config)
    for name, weight in merged.named_parameters():
        weight.data.copy_(deltas.merged(name, weight.data))
    torch.testing.assert_close(answers(merged), wanted, rtol=1e-3, atol=1e-3)
    deltas.check_found(fresh.parameter for fresh in fresh_weights(config, "original"))
    torch.testing.assert_close(answers(live.merge_and_unload()), wanted, rtol=1e-3, atol=1e-3)


def test_embeddings_may_move_to_the_host(bases):
    config = settings(bases["llama"])
    model = stirred(attach(load_backbone(config), config))
    wanted = answers(model)
    assert keep_embeddings_on_host(model)
    torch.testing.assert_close(answers(model), wanted, rtol=0, atol=0)


@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_the_plan_counts_the_rows_once_if_they_are_tied(bases, family):
    config = settings(bases[family])
    model = attach(load_backbone(config), config)
    shape = ModelShape.from_config(load_backbone(config).config.to_dict(), "it")
    inputs = PlanInputs(config, DataStats(1, 1, 1, 1, 1.0), shape, hardware_named("4090"))
    assert count_parameters(model).trainable == inputs.adapter_parameters
    assert LORA.detach(model).get_input_embeddings().weight.shape == (260, 64)


def test_a_resumed_run_ends_in_the_same_bits(bases, tmp_path):
    given = {"trainable_tokens": ("<|user|>", "A"), "max_steps": 4, "init_lora_weights": "pissa"}
    whole = trainer(str(bases["llama-tied"]), tmp_path / "whole", **given)
    before = whole.model.get_base_model().lm_head.token_rows.detach().clone()
    whole.run()
    assert not torch.equal(before, whole.model.get_base_model().lm_head.token_rows)
    again = trainer(str(bases["llama-tied"]), tmp_path / "again", **given)
    again.run(tmp_path / "whole" / "step-000002")
    assert_same(whole, again)
    saved = load_file(tmp_path / "whole" / "step-000002" / "adapter" / "adapter_model.safetensors")
    assert sum(name.endswith("trainable_tokens_delta") for name in saved) == 1


def test_what_does_not_fit_is_refused(bases, tmp_path):
    with pytest.raises(UsageError, match=r"'<\|im_start\|>' is no token of the base: its tokenizer makes \d+ tokens"):
        token_ids(settings(bases["llama"], trainable_tokens="<|im_start|>"))
    config, folder = settings(bases["llama"]), tmp_path / "adapter"
    LORA.save(stirred(attach(load_backbone(config), config)), folder, config)
    with pytest.raises(AdapterError, match="has trained rows of tokens, but the run no trained rows"):
        LORA.load(load_backbone(config), folder, config.model_copy(update={"trainable_tokens": ()}))
    other = settings(bases["llama"], trainable_tokens=("<|eos|>", "<|user|>"))
    with pytest.raises(AdapterError, match=r"rows of .* are not those of this run"):
        LORA.restore(attach(load_backbone(other), other), folder)
    written = json.loads((folder / "adapter_config.json").read_text())
    for wrong, words in (
        ([3, 2], "no mapping"),
        ({"embed_tokens": [3, 3]}, "no mapping"),
        ({"x": [3]}, "not those of"),
    ):
        (folder / "adapter_config.json").write_text(json.dumps({**written, "trainable_token_indices": wrong}))
        with pytest.raises(AdapterError, match=words):
            LORA.load(load_backbone(config), folder, config)
