import copy

import pytest
import torch
from torch import nn

from lorafit.backbone import FrozenLinear4bit, multiply_packed, quantize

SHAPES = [(4096, 4096), (14336, 4096), (4096, 14336), (2112, 4352)]
"""One with a part, with several, and with sizes that only just suit."""


def linear(out_features: int, in_features: int, device: str, *, double: bool = True) -> FrozenLinear4bit:
    generator = torch.Generator(device).manual_seed(1)
    weight = torch.randn(out_features, in_features, generator=generator, device=device, dtype=torch.bfloat16) / 50
    return quantize(weight, double=double)


def test_on_a_cpu_no_layer_takes_it():
    layer = linear(64, 512, "cpu")
    assert multiply_packed(nn.Sequential(layer)) == 0
    assert layer.packed_product is None


def test_only_rows_without_gradient_that_no_other_kernel_is_faster_for_take_it():
    layer = linear(64, 512, "cpu")
    layer.packed_product = lambda x, packed, scales, values: x.new_full((*x.shape[:-1], 64), 7.0)
    rows = {count: torch.ones(1, count, 512, dtype=torch.bfloat16) for count in (16, 17, 64, 65)}
    with torch.inference_mode():
        assert [bool((layer(x) == 7).all()) for x in rows.values()] == [False, True, True, False]
    assert not (layer(rows[64]) == 7).any()
    assert copy.deepcopy(layer).packed_product is layer.packed_product
    layer.keep_dense()
    with torch.inference_mode():
        assert not (layer(rows[64]) == 7).any()


@pytest.mark.gpu
@pytest.mark.parametrize("double", [True, False], ids=["double", "single"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@torch.inference_mode()
def test_on_a_gpu_it_is_the_product_with_the_dense_weight(shape, double):
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the kernel is Hopper's")
    layer = linear(*shape, "cuda", double=double)
    assert multiply_packed(nn.Sequential(layer)) == 1
    x = torch.randn(64, shape[1], device="cuda", dtype=torch.bfloat16)
    exact = x.double() @ layer.unpacked().double().t()
    found = layer(x)
    assert (found - exact).norm() / exact.norm() < 2**-8  # the output is rounded to bf16 once
    assert all(torch.equal(layer(x), found) for _ in range(20))
    for rows in (17, 33, 63):
        assert torch.equal(layer(x[:rows].reshape(1, rows, -1))[0], found[:rows])
