import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from families_zoo import small_config
from lorafit.backbone import FrozenExpertsLinear, fresh_weights, frozen_weights, load_backbone
from lorafit.backbone.architecture import auto_class
from lorafit.config import RunConfig
from lorafit.errors import BackboneError
from tiny_models import FAMILIES, save_base, some_ids


def live_weights(model):
    """What the model multiplies by, under checkpoint names."""
    frozen = frozen_weights(model)
    for name, layer in frozen.items():
        yield name, layer.stacked() if isinstance(layer, FrozenExpertsLinear) else layer.dense
    inside = {id(layer.weight) for layer in frozen.values()}
    yield from ((name, weight) for name, weight in model.named_parameters() if id(weight) not in inside)


def parameters(weights):
    return {weight.parameter: weight.tensor for weight in weights}


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
def test_quantized_weights_are_bit_for_bit_those_the_live_model_multiplies_by(tmp_path, stored, compute):
    config = RunConfig(base=str(save_base(tmp_path / "base", dtype=stored)), compute=compute)
    fresh = parameters(fresh_weights(config, "quantized"))
    live = dict(live_weights(load_backbone(config)))
    assert set(fresh) == set(live)
    for name, weight in live.items():
        assert torch.equal(fresh[name].to(weight.dtype), weight), name


@pytest.mark.parametrize("family", FAMILIES)
def test_each_familys_quantized_linears_are_all_found(tmp_path, family):
    config = RunConfig(base=str(save_base(tmp_path / "base", family)))
    fresh = parameters(fresh_weights(config, "quantized"))
    model = load_backbone(config)
    live = dict(live_weights(model))
    assert set(frozen_weights(model)) <= set(fresh)
    for name in set(fresh) & set(live):
        assert torch.equal(fresh[name].to(live[name].dtype), live[name]), name


def test_original_weights_are_as_stored(tmp_path):
    base = save_base(tmp_path / "base", "mixtral")
    fresh = {weight.stored: weight.tensor for weight in fresh_weights(RunConfig(base=str(base)), "original")}
    stored = {name: tensor for path in base.glob("*.safetensors") for name, tensor in load_file(path).items()}
    assert set(fresh) == set(stored)
    assert all(
        torch.equal(fresh[name], tensor) and fresh[name].dtype == tensor.dtype for name, tensor in stored.items()
    )


def test_a_model_that_has_run_changes_nothing(tmp_path):
    config = RunConfig(base=str(save_base(tmp_path / "base")))
    before = parameters(fresh_weights(config, "quantized"))
    model = load_backbone(config).eval()
    with torch.inference_mode():
        model(some_ids())
    after = parameters(fresh_weights(config, "quantized"))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_without_quantisation_quantized_is_the_original(tmp_path):
    config = RunConfig(base=str(save_base(tmp_path / "base")), quantization="none")
    original = parameters(fresh_weights(config, "original"))
    assert all(torch.equal(fresh.tensor, original[fresh.parameter]) for fresh in fresh_weights(config, "quantized"))


def test_a_prequantised_base_gives_the_live_weights_and_has_no_original(tmp_path):
    source = RunConfig(base=str(save_base(tmp_path / "base")))
    load_backbone(source).save_pretrained(tmp_path / "packed")
    config = RunConfig(base=str(tmp_path / "packed"))
    fresh = parameters(fresh_weights(config, "quantized"))
    live = dict(live_weights(load_backbone(config)))
    assert set(fresh) == set(live)
    assert all(torch.equal(fresh[name].to(weight.dtype), weight) for name, weight in live.items())
    with pytest.raises(BackboneError, match="4 bits only"):
        next(fresh_weights(config, "original"))


def test_an_old_checkpoint_without_the_prefix_is_still_quantised(tmp_path):
    base = save_base(tmp_path / "base")
    index = json.loads((base / "model.safetensors.index.json").read_text())
    for path in base.glob("*.safetensors"):
        save_file(
            {name.removeprefix("model."): t for name, t in load_file(path).items()}, path, metadata={"format": "pt"}
        )
    index["weight_map"] = {name.removeprefix("model."): file for name, file in index["weight_map"].items()}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    config = RunConfig(base=str(base))
    fresh = parameters(fresh_weights(config, "quantized"))
    for name, weight in live_weights(load_backbone(config)):
        assert torch.equal(fresh[name].to(weight.dtype), weight), name


def test_linears_stored_under_names_that_cannot_be_followed_are_an_error(tmp_path):
    base = save_base(tmp_path / "base")
    index = json.loads((base / "model.safetensors.index.json").read_text())
    for path in base.glob("*.safetensors"):
        tensors = {name.replace("q_proj", "query"): t for name, t in load_file(path).items()}
        save_file(tensors, path, metadata={"format": "pt"})
    index["weight_map"] = {name.replace("q_proj", "query"): file for name, file in index["weight_map"].items()}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(BackboneError, match="q_proj"):
        next(fresh_weights(RunConfig(base=str(base)), "quantized"))


@pytest.mark.parametrize("family", ["hrm_text", "ernie4_5_vl_moe", "zamba2"])
def test_parameters_stored_together_or_shared_come_out_as_they_were_stored(family, tmp_path):
    torch.manual_seed(0)
    config = small_config(family)
    auto_class(config).from_config(config).save_pretrained(tmp_path / "base")
    stored = load_file(tmp_path / "base/model.safetensors")
    run = RunConfig(base=str(tmp_path / "base"))
    live = dict(live_weights(load_backbone(run)))
    fresh, again = {}, {}
    for weight in fresh_weights(run, "quantized", fused=live):
        fresh[weight.parameter] = weight.tensor
        again |= weight.parts(weight.tensor)
    assert all(torch.equal(fresh[name].to(live[name].dtype), live[name]) for name in fresh.keys() & live.keys())
    assert {name: tensor.shape for name, tensor in again.items()} == {name: t.shape for name, t in stored.items()}
    exact = [weight.parts(weight.tensor) for weight in fresh_weights(run, "original", fused=live)]
    assert all(torch.equal(tensor, stored[name]) for parts in exact for name, tensor in parts.items())
