"""Embedding and head train whole beside the adapters: PEFT's gradients, PEFT's file, and a merge that is the model."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from little_trainer import assert_same, trainer
from lorafit.backbone import fresh_weights, load_backbone
from lorafit.config import RunConfig
from lorafit.engine import keep_embeddings_on_host
from lorafit.engine.loss.logit_rules import logit_steps
from lorafit.engine.loss.vocabulary import chunked_loss
from lorafit.errors import AdapterError, UsageError, VerificationError
from lorafit.hardware import hardware_named
from lorafit.memory.footprint import static_memory
from lorafit.memory.inputs import DataStats, PlanInputs
from lorafit.methods import METHODS
from lorafit.methods.lora import Deltas, attach, count_parameters
from lorafit.shapes import ModelShape
from stirred import assert_learns_alike, plain_model, stirred
from tiny_models import save_base, some_ids

LORA = METHODS["lora"]
BOTH = ("embed_tokens", "lm_head")
FAMILIES = ("llama", "llama-tied", "gemma3_text")
CASES = [("llama", BOTH), ("llama", ("lm_head",)), ("llama", ("embed_tokens",)), ("llama-tied", ("lm_head",))]
CASES += [("gemma3_text", BOTH)]


def settings(base, **given):
    return RunConfig(**{"base": str(base), "modules_to_save": BOTH, "dropout": 0.0, "rank": 4, "alpha": 8.0, **given})


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return {family: save_base(tmp_path_factory.mktemp(family), family) for family in FAMILIES}


def answers(model):
    with torch.no_grad():
        return model.eval()(some_ids()).logits


def of_peft(config, modules, *, tied):
    """PEFT's model; it ties the copies that train only if the embedding is named, and if it is told so."""
    whole = {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True} if tied else {}
    whole = whole or {"modules_to_save": list(modules)}
    settings = LoraConfig(r=4, lora_alpha=8.0, target_modules=["q_proj", "v_proj"], **whole)
    return get_peft_model(load_backbone(config), settings)


@pytest.mark.parametrize(("family", "modules"), CASES)
def test_loss_and_gradients_are_pefts(bases, family, modules):
    config = settings(bases[family], quantization="none", modules_to_save=modules)
    ours = stirred(attach(load_backbone(config), config))
    theirs = of_peft(config, modules, tied=family != "llama")
    assert_learns_alike(
        ours, theirs, some_ids(), lambda name: name.replace(".modules_to_save.default.weight", ".whole_table")
    )


def test_the_loss_in_chunks_has_the_same_gradient(bases):
    config = settings(bases["llama-tied"])
    model = stirred(attach(load_backbone(config), config))
    core, ids = model.get_base_model(), some_ids()
    whole = model(input_ids=ids, labels=ids).loss
    wanted = torch.autograd.grad(whole, core.lm_head.whole_table)[0]
    hidden = core.model(ids).last_hidden_state[:, :-1].flatten(0, 1)
    targets, steps = ids[:, 1:].flatten(), logit_steps(core.config)
    chunked = chunked_loss(hidden, targets, core.lm_head, steps, chunk_rows=4, share=1 / len(targets))
    torch.testing.assert_close(chunked, whole, rtol=1e-5, atol=1e-5)
    found = torch.autograd.grad(chunked, core.lm_head.whole_table)[0]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("family", "modules"), CASES)
def test_the_merge_and_plain_peft_are_the_live_model(bases, tmp_path, family, modules):
    quantization = "none" if family == "gemma3_text" else "nf4"
    config, folder = settings(bases[family], quantization=quantization, modules_to_save=modules), tmp_path / "adapter"
    live = stirred(attach(load_backbone(config), config))
    wanted, of_base = answers(live), answers(load_backbone(config))
    with LORA.without(live):
        assert torch.equal(answers(live), of_base)
    LORA.save(live, folder, config)
    loaded = LORA.load(load_backbone(config), folder, config)
    torch.testing.assert_close(answers(loaded), wanted, rtol=0, atol=0)
    with LORA.without(loaded):
        assert torch.equal(answers(loaded), of_base)
    assert torch.equal(answers(LORA.detach(loaded)), of_base)
    named = list(modules if family == "llama" else BOTH)
    assert json.loads((folder / "adapter_config.json").read_text())["modules_to_save"] == named
    theirs = PeftModel.from_pretrained(plain_model(config), folder)
    torch.testing.assert_close(answers(theirs), wanted, rtol=1e-4, atol=1e-4)
    merged, deltas = plain_model(config), Deltas.from_folder(folder, config)
    for name, weight in merged.named_parameters():
        weight.data.copy_(deltas.merged(name, weight.data))
    torch.testing.assert_close(answers(merged), wanted, rtol=1e-3, atol=1e-3)
    deltas.check_found(fresh.parameter for fresh in fresh_weights(config, "original"))
    torch.testing.assert_close(answers(live.merge_and_unload()), wanted, rtol=1e-3, atol=1e-3)


def test_the_frozen_embeddings_may_move_to_the_host(bases):
    config = settings(bases["llama"])
    model = stirred(attach(load_backbone(config), config))
    wanted = answers(model)
    assert keep_embeddings_on_host(model)
    torch.testing.assert_close(answers(model), wanted, rtol=0, atol=0)
    with LORA.without(model):
        assert torch.equal(answers(model), answers(load_backbone(config)))


@pytest.mark.parametrize(("family", "modules"), CASES)
def test_the_plan_counts_weights_gradients_and_moments(bases, family, modules):
    config = settings(bases[family], modules_to_save=modules, optimizer="adamw")
    model = attach(load_backbone(config), config)
    shape = ModelShape.from_config(load_backbone(config).config.to_dict(), "it")
    inputs = PlanInputs(config, DataStats(1, 1, 1, 1, 1.0), shape, hardware_named("4090"))
    assert count_parameters(model).trainable == inputs.adapter_parameters
    parts = {part.name: part.size_bytes for part in static_memory(inputs)}
    assert parts["trained embedding and head"] == 4 * 260 * 64 * (1 if family != "llama" else len(modules))
    assert parts["gradients"] == 4 * inputs.adapter_parameters == parts["optimizer state"] // 2
    assert (inputs.head_gradient_bytes > 0) == (modules != ("embed_tokens",))


def test_a_resumed_run_ends_in_the_same_bits(bases, tmp_path):
    given = {"modules_to_save": ("embed_tokens",), "max_steps": 4}
    whole = trainer(str(bases["llama-tied"]), tmp_path / "whole", **given)
    before = whole.model.get_base_model().lm_head.whole_table.detach().clone()
    whole.run()
    assert not torch.equal(before, whole.model.get_base_model().lm_head.whole_table)
    again = trainer(str(bases["llama-tied"]), tmp_path / "again", **given)
    again.run(tmp_path / "whole" / "step-000002")
    assert_same(whole, again)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"modules_to_save": "norm"}, "'norm' does not train whole beside adapters"),
        ({"trainable_tokens": "A"}, "modules_to_save trains every row"),
        ({"modules_to_save": "lm_head", "new_tokens": "<x>"}, "only lm_head trains whole"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(given, words):
    with pytest.raises(UsageError, match=words):
        settings("base", **given)


def test_names_of_other_families_are_known():
    assert settings("base", modules_to_save=["transformer.wte", "embed_out"]).modules_to_save == BOTH


def test_an_adapter_that_does_not_fit_is_refused(bases, tmp_path):
    config, folder = settings(bases["llama-tied"]), tmp_path / "adapter"
    LORA.save(stirred(attach(load_backbone(config), config)), folder, config)
    with pytest.raises(AdapterError, match="has modules that were trained whole, but the run no modules"):
        LORA.load(load_backbone(config), folder, config.model_copy(update={"modules_to_save": ()}))
    file, whole = folder / "adapter_model.safetensors", load_file(folder / "adapter_model.safetensors")
    head = "base_model.model.lm_head.weight"
    save_file({**whole, head: whole[head] + 1}, file)
    with pytest.raises(AdapterError, match="tied in this base, but differ"):
        LORA.load(load_backbone(config), folder, config)
    with pytest.raises(VerificationError, match="tied in the base, but differ"):
        Deltas.from_folder(folder, config)
    save_file({name: tensor for name, tensor in whole.items() if name != head}, file)
    with pytest.raises(AdapterError, match="modules_to_save names lm_head, for which the adapter has no weights"):
        LORA.load(load_backbone(config), folder, config)
    other = json.loads((folder / "adapter_config.json").read_text()) | {"modules_to_save": ["norm"]}
    (folder / "adapter_config.json").write_text(json.dumps(other))
    lora = {name: tensor for name, tensor in whole.items() if ".lora_" in name}
    save_file({**lora, "base_model.model.model.norm.weight": torch.ones(64, 1)}, file)
    with pytest.raises(AdapterError, match=r"the whole of model\.norm, and lorafit reads embedding and head alone"):
        LORA.load(load_backbone(config), folder, config)
