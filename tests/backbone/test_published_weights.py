import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, Mxfp4Config

from lorafit.backbone import fresh_weights, load_backbone, stored_dtype
from lorafit.backbone.base_checkpoint import Checkpoint, base_damages
from lorafit.config import RunConfig
from lorafit.errors import BackboneError
from published_bases import publish
from tiny_models import save_small

CASES = {
    "gpt_oss": ("mxfp4", None, Mxfp4Config(dequantize=True)),
    "qwen3": ("fp8", (32, 32), FineGrainedFP8Config(dequantize=True, weight_block_size=(32, 32))),
    "mistral": ("fp8", None, FineGrainedFP8Config(dequantize=True, weight_block_size=None)),
    "qwen3_moe": ("fp8", (16, 32), FineGrainedFP8Config(dequantize=True, weight_block_size=(16, 32))),
}


@pytest.fixture(scope="module", params=CASES)
def published(request, tmp_path_factory):
    """A base published in FP8 or MXFP4, and the model that transformers makes of it in bf16."""
    method, block, config = CASES[request.param]
    folder = tmp_path_factory.mktemp("published") / request.param
    save_small(folder, request.param)
    publish(folder, method, block)
    settings = {"quantization_config": config, "dtype": torch.bfloat16}
    theirs = AutoModelForCausalLM.from_pretrained(folder, **settings)
    assert getattr(theirs.config, "quantization_config", None) is None
    return folder, theirs


def test_what_is_loaded_has_the_bits_of_transformers_dequantised_load(published):
    folder, theirs = published
    ours = load_backbone(RunConfig(base=str(folder), quantization="none", compute="bf16"))
    wanted = dict(theirs.named_parameters())
    assert dict(ours.named_parameters()).keys() == wanted.keys()
    for name, value in ours.named_parameters():
        assert torch.equal(value, wanted[name].to(value.dtype)), name
    assert stored_dtype(folder) is torch.bfloat16


def test_4_bits_are_made_of_the_dequantised_values(published, tmp_path):
    folder, theirs = published
    theirs.save_pretrained(tmp_path / "dense", save_original_format=False)
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert "quantization_config" not in config
    of_dense, ours = (
        {each.parameter: each.tensor for each in fresh_weights(RunConfig(base=str(place)), "quantized")}
        for place in (tmp_path / "dense", folder)
    )
    assert of_dense.keys() == ours.keys()
    assert all(torch.equal(ours[name].float(), of_dense[name].float()) for name in ours)
    one, other = (load_backbone(RunConfig(base=str(place))) for place in (folder, tmp_path / "dense"))
    ids = torch.arange(5, 35)[None]
    assert torch.equal(one(ids).logits, other(ids).logits)


def test_a_last_block_that_is_not_full_has_its_own_scale(tmp_path):
    save_small(tmp_path, "qwen3")
    dense = {name: value for file in tmp_path.glob("*.safetensors") for name, value in load_file(file).items()}
    publish(tmp_path, "fp8", (40, 48))  # of 64 rows and columns
    checkpoint = Checkpoint.open(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    for name in ("model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight"):
        scales = stored[f"{name}_scale_inv"].repeat_interleave(40, 0).repeat_interleave(48, 1)
        rows, columns = dense[name].shape
        wanted = (stored[name].float() * scales[:rows, :columns]).to(torch.bfloat16)
        assert torch.equal(checkpoint.read(name), wanted)
        assert (wanted - dense[name].to(torch.bfloat16)).abs().max() < 0.1 * dense[name].abs().max()


def test_a_weight_without_its_scale_is_one_sentence(tmp_path):
    save_small(tmp_path, "qwen3")
    publish(tmp_path, "fp8")
    stored = load_file(tmp_path / "model.safetensors")
    del stored["model.layers.0.mlp.up_proj.weight_scale_inv"]
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BackboneError, match=r"layers\.0\.mlp\.up_proj\.weight is stored in FP8 without its scale"):
        load_backbone(RunConfig(base=str(tmp_path)))
    assert [error.what for error in base_damages(tmp_path)]
