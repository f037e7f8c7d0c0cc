"""One bf16 step's adapter gradient is as near to fp32 as that of transformers, peft and bitsandbytes."""

import pytest
import torch

from tiny_models import save_base

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="bench/parity.py gradients is the form for a GPU")


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_a_bf16_gradient_is_as_near_to_fp32_as_the_references(parity, family, tmp_path):
    base = save_base(tmp_path / "base", family)
    settings = {"seed": 0, "compute": "bf16", "targets": "qv", "max_length": 256}
    with parity.quick_products():
        found = parity.gradient_distances(tmp_path, str(base), 6, **settings)
    assert found.theirs_to_exact > 1e-3, "not in bf16"
    assert found.agree, found.line(family)
    # two roundings of one number differ by as much as both are off
    assert found.ours_to_theirs < found.theirs_to_exact


def test_a_gradient_that_is_too_far_off_or_not_finite_does_not_agree(parity):
    def found(ours):
        return parity.parity_gradients.Distances(ours, 0.01, 0.0, 0.0)

    assert found(0.012).agree and found(0.001).agree
    assert not found(0.013).agree
    assert not found(float("nan")).agree


def test_quick_products_are_rounded_once_whatever_is_multiplied_beside_them(parity):
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(shape, generator=generator).bfloat16() for shape in ((40, 96), (96, 32)))
    with parity.quick_products():
        whole, few = left @ right, left[:7] @ right
    assert torch.equal(whole, (left.double() @ right.double()).bfloat16())
    assert torch.equal(whole[:7], few)
