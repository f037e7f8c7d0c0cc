"""Thawing: plain linears that compute what the frozen ones did."""

import torch

from lorafit.backbone import FrozenLinear4bit, forget_quantisation, load_backbone, thaw_linears
from lorafit.config import resolve
from tiny_models import save_base, some_ids


def test_a_thawed_model_answers_as_the_frozen_one_and_saves_as_a_plain_one(tmp_path):
    model = load_backbone(resolve(flags={"base": str(save_base(tmp_path / "base"))}).config)
    frozen = model(some_ids()).logits
    thawed = forget_quantisation(thaw_linears(model))
    assert torch.allclose(thawed(some_ids()).logits, frozen, atol=1e-5)
    assert not any(isinstance(module, FrozenLinear4bit) for module in thawed.modules())
    thawed.save_pretrained(tmp_path / "plain")
    again = type(thawed).from_pretrained(tmp_path / "plain", dtype=torch.float32)
    assert torch.equal(again(some_ids()).logits, thawed(some_ids()).logits)
    assert not hasattr(again.config, "quantization_config")
