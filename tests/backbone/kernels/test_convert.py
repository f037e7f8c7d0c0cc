"""Dequantizing: plain linears that compute what the frozen ones did."""

import torch

from lorafit.backbone import FrozenLinear4bit, dequantize_linears, forget_quantisation, load_backbone
from lorafit.config import resolve
from tiny_models import save_base, some_ids


def test_a_dequantized_model_answers_as_the_frozen_one_and_saves_as_a_plain_one(tmp_path):
    model = load_backbone(resolve(flags={"base": str(save_base(tmp_path / "base"))}).config)
    frozen = model(some_ids()).logits
    dequantized = forget_quantisation(dequantize_linears(model))
    assert torch.allclose(dequantized(some_ids()).logits, frozen, atol=1e-5)
    assert not any(isinstance(module, FrozenLinear4bit) for module in dequantized.modules())
    dequantized.save_pretrained(tmp_path / "plain")
    again = type(dequantized).from_pretrained(tmp_path / "plain", dtype=torch.float32)
    assert torch.equal(again(some_ids()).logits, dequantized(some_ids()).logits)
    assert not hasattr(again.config, "quantization_config")
