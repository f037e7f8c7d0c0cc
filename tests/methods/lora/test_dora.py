"""DoRA over a frozen base: PEFT's loss and gradients, the same bits after a resume, and a merge that is the model."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from little_trainer import assert_same, trainer
from lorafit.backbone import load_backbone
from lorafit.config import RunConfig
from lorafit.engine import DecoderLayers
from lorafit.engine.autotune.measure import mlp_matmuls
from lorafit.errors import AdapterError
from lorafit.hardware import hardware_named
from lorafit.memory.inputs import DataStats, PlanInputs
from lorafit.methods import METHODS
from lorafit.methods.lora import Deltas, attach, count_parameters
from lorafit.shapes import ModelShape
from stirred import plain_model, stirred
from tiny_models import FAMILIES, save_base, some_ids

LORA = METHODS["lora"]


def settings(base, **given):
    return RunConfig(**{"base": str(base), "dora": True, "dropout": 0.0, "rank": 4, "alpha": 8.0, **given})


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base"), "qwen2")  # with biases


def loss_and_gradients(model):
    model.zero_grad()
    ids = some_ids()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.detach(), {
        name: weight.grad.clone() for name, weight in model.named_parameters() if weight.requires_grad
    }


@pytest.mark.parametrize(
    ("family", "given"),
    [("qwen2", {}), ("qwen2", {"quantization": "none", "targets": "all-linear"}), ("gpt2", {"quantization": "none"})],
    ids=["nf4", "16 bits", "transposed"],
)
def test_loss_and_gradients_are_pefts(base, tmp_path, family, given, monkeypatch):
    monkeypatch.setitem(FAMILIES, "gpt2", {"n_embd": 64, "n_layer": 2, "n_head": 4})
    at = base if family == "qwen2" else save_base(tmp_path / family, family)
    config = settings(at, **given)
    ours = stirred(attach(load_backbone(config), config)).train()
    found, gradients = loss_and_gradients(ours)
    own = next(iter(ours.peft_config.values()))
    same = LoraConfig(
        **{key: getattr(own, key) for key in ("r", "lora_alpha", "use_dora", "target_modules", "fan_in_fan_out")}
    )
    theirs = get_peft_model(plain_model(config), same).train()
    names = dict(ours.named_parameters())
    for name, weight in theirs.named_parameters():
        if weight.requires_grad:
            weight.data.copy_(names[name].data)
    wanted, reference = loss_and_gradients(theirs)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    assert gradients.keys() == reference.keys() and any("magnitude" in name for name in gradients)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, reference[name], rtol=1e-4, atol=1e-6, msg=name)


def test_a_fresh_adapter_changes_nothing_and_the_count_is_the_plans(base):
    config = settings(base)
    model = attach(load_backbone(config), config).eval()
    with torch.no_grad():
        tuned = model(some_ids()).logits
        with LORA.without(model):
            torch.testing.assert_close(tuned, model(some_ids()).logits, rtol=1e-5, atol=1e-5)
    shape = ModelShape.from_config(load_backbone(config).config.to_dict(), "it")
    inputs = PlanInputs(config, DataStats(1, 1, 1, 1, 1.0), shape, hardware_named("4090"))
    assert count_parameters(model).trainable == inputs.adapter_parameters
    assert inputs.adapter_parameters > inputs.with_settings(dora=False).adapter_parameters


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_the_merge_and_plain_peft_are_the_live_model(base, tmp_path, quantization):
    config = settings(base, quantization=quantization)
    live = stirred(attach(load_backbone(config), config)).eval()
    with torch.no_grad():
        wanted = live(some_ids()).logits
    LORA.save(live, tmp_path / "adapter", config)
    with torch.no_grad():
        again = LORA.load(load_backbone(config), tmp_path / "adapter", config)
        torch.testing.assert_close(again(some_ids()).logits, wanted, rtol=0, atol=0)
        theirs = PeftModel.from_pretrained(plain_model(config), tmp_path / "adapter").eval()
        torch.testing.assert_close(theirs(some_ids()).logits, wanted, rtol=1e-4, atol=1e-4)
        merged = plain_model(config)
        deltas = Deltas.from_folder(tmp_path / "adapter")
        for name, weight in merged.named_parameters():
            weight.copy_(deltas.merged(name, weight.data))
        torch.testing.assert_close(merged(some_ids()).logits, wanted, rtol=1e-4, atol=1e-4)
        assert deltas["model.layers.0.self_attn.q_proj.weight"].magnitude is not None
        torch.testing.assert_close(live.merge_and_unload()(some_ids()).logits, wanted, rtol=1e-4, atol=1e-4)


def test_files_of_the_other_kind_are_refused(base, tmp_path):
    config = settings(base)
    LORA.save(stirred(attach(load_backbone(config), config)), tmp_path / "adapter", config)
    with pytest.raises(AdapterError, match="the adapter is DoRA, but the run was trained with LoRA"):
        LORA.load(load_backbone(config), tmp_path / "adapter", config.model_copy(update={"dora": False}))
    text = (tmp_path / "adapter" / "adapter_config.json").read_text()
    (tmp_path / "adapter" / "adapter_config.json").write_text(text.replace('"use_dora": true', '"use_dora": false'))
    with pytest.raises(AdapterError, match="lora_magnitude_vector is no LoRA weight"):
        Deltas.from_folder(tmp_path / "adapter")


def test_a_resumed_run_ends_in_the_same_bits(base, tmp_path):
    given = {"dora": True, "max_steps": 6, "lr": 2e-3, "loraplus_lr_ratio": 4.0}
    whole = trainer(str(base), tmp_path / "whole", **given)
    first = {name: weight.detach().clone() for name, weight in whole.model.named_parameters() if weight.ndim == 1}
    whole.run()
    moved = [name for name, weight in whole.model.named_parameters() if weight.requires_grad and weight.ndim == 1]
    assert moved and all(not torch.equal(first[name], whole.model.get_parameter(name)) for name in moved)
    again = trainer(str(base), tmp_path / "again", **given)
    again.run(tmp_path / "whole" / "step-000003")
    assert_same(whole, again)


def test_layers_compile_in_one_graph_with_the_same_gradients(base):
    config = settings(base)
    model = stirred(attach(load_backbone(config, dense_budget_bytes=0), config)).train()
    wanted = loss_and_gradients(model)
    with DecoderLayers(model, compiled=True, backend="aot_eager") as layers:
        found = loss_and_gradients(model)
    assert layers.compiled and not layers.notes
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-5, atol=1e-5)
    for name, gradient in found[1].items():
        torch.testing.assert_close(gradient, wanted[1][name], rtol=1e-3, atol=1e-5, msg=name)


def test_it_is_pefts_file(base, tmp_path):
    """What plain transformers and PEFT train is read back here with the same answers."""
    config = settings(base, quantization="none")
    same = LoraConfig(r=4, lora_alpha=8.0, use_dora=True, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    theirs = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), same).eval()
    stirred(theirs).save_pretrained(tmp_path / "theirs")
    ours = LORA.load(load_backbone(config), tmp_path / "theirs", config).eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(some_ids()).logits, theirs(some_ids()).logits, rtol=1e-4, atol=1e-4)


def test_autotune_measures_what_its_mlp_keeps(base):
    """For plain LoRA it would time the two products, on a GPU."""
    config = settings(base, targets="all-linear")
    model = attach(load_backbone(config), config)
    with DecoderLayers(model, compiled=True, backend="eager") as layers:
        assert layers.widths and mlp_matmuls(layers, 8) is None
