"""Products in FP8: how far they round, that weights train in them, and who takes no part."""

import numpy as np
import pytest
import torch
from torch import nn

from lorafit.api.build_model import sharded_model
from lorafit.backbone import TrainedLinearFp8, load_backbone, product_fp8
from lorafit.backbone.kernels.trained_linear_fp8 import linear_fp8
from lorafit.config import RunConfig
from lorafit.engine import collate, packed, summed_loss
from lorafit.engine.layers.decoder import _matmul_width
from lorafit.errors import BackboneError
from lorafit.methods import METHODS
from lorafit.methods.full.in_fp8 import multiply_in_fp8
from tiny_models import save_base

FULL = METHODS["full"]


def off(found, wanted):
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


def products(x, weight, grad, multiply):
    """Output and gradients of one product."""
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y = multiply(x, weight)
    y.backward(grad)
    return y.detach(), x.grad, weight.grad


@pytest.mark.parametrize("tokens", [32, 37])
def test_each_product_is_off_by_the_rounding_of_its_operands(tokens):
    """e4m3 has four bits of precision and e5m2 three: 2.6 % and 5.1 % of a number, both operands' add up in squares."""
    torch.manual_seed(0)
    x, weight, grad = torch.randn(1, tokens, 64), torch.randn(96, 64) / 8, torch.randn(1, tokens, 96) * 1e-4
    exact, fp8 = (products(x, weight, grad, multiply) for multiply in (nn.functional.linear, linear_fp8))
    y, grad_x, grad_weight = (off(found, wanted) for found, wanted in zip(fp8, exact, strict=True))
    assert 0.02 < y < 0.05 and 0.04 < grad_x < 0.08 and 0.04 < grad_weight < 0.08


@pytest.mark.gpu
def test_a_compiled_product_has_the_gradients_of_an_eager_one():
    """With torch 2.11 they were zero once, and a run went on without them."""
    torch.manual_seed(0)
    x, weight, grad = (
        torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in ((1, 64, 128), (256, 128), (1, 64, 256))
    )
    eager, compiled = (products(x, weight, grad, multiply) for multiply in (linear_fp8, torch.compile(linear_fp8)))
    assert max(off(found, wanted) for found, wanted in zip(compiled, eager, strict=True)) < 0.02


def test_a_row_is_rounded_alike_beside_any_other():
    torch.manual_seed(0)
    row, other, weight = torch.randn(1, 5, 64), 30 * torch.randn(1, 5, 64), torch.randn(32, 64)
    assert off(linear_fp8(torch.cat([row, other], 1), weight)[:, :5], linear_fp8(row, weight)) < 1e-3


@pytest.mark.parametrize("size", [0.0, 1e-20, 1e20, 3e38])
def test_numbers_of_any_size_are_multiplied(size):
    found = linear_fp8(torch.full((1, 4, 64), size), torch.eye(64)).double()
    assert torch.allclose(found, torch.full_like(found, size), rtol=0.07, atol=0)


def test_what_is_not_finite_is_seen():
    x = torch.ones(1, 4, 64)
    x[0, 1, 2] = torch.nan
    assert linear_fp8(x, torch.eye(64)).isnan().any()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return str(save_base(tmp_path_factory.mktemp("base"), "llama", num_hidden_layers=2))


def made(base, compute, dtype="fp32"):
    config = RunConfig(base=base, method="full", quantization="none", compute=dtype)
    return FULL.prepare(load_backbone(config), config.model_copy(update={"compute": compute})).train()


def test_decoder_linears_alone_multiply_in_fp8(base):
    model = made(base, "fp8")
    inside = {name for name, module in model.named_modules() if isinstance(module, TrainedLinearFp8)}
    assert len(inside) == 14 and all(name.startswith("model.layers.") for name in inside)
    assert type(model.lm_head) is nn.Linear
    assert not any(isinstance(module, TrainedLinearFp8) for module in made(base, "bf16").modules())


def test_widths_that_fp8_does_not_take_and_routers_stay_as_they_are(tmp_path):
    config = RunConfig(base=str(save_base(tmp_path / "odd", "llama", intermediate_size=88)), quantization="none")
    chosen = multiply_in_fp8(load_backbone(config))
    assert chosen and not any("mlp" in name for name in chosen)


def rows(seed):
    random = np.random.default_rng(seed)
    return [(random.integers(4, 250, length), np.arange(length) > 0) for length in (9, 23, 17)]


def trained(model, steps=12):
    """Losses of `steps` steps on the same rows."""
    optimizer, losses = torch.optim.AdamW(FULL.trainable(model), lr=1e-3), []
    for step in range(steps):
        with packed(model):
            loss = summed_loss(model, collate(rows(step % 3)))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()) / 46)
    return losses


def test_losses_in_fp8_are_within_a_percent_of_those_without(base):
    """Three seeds of the demo's base, to loss 3 and below: bench/full_fp8.py."""
    exact, fp8 = trained(made(base, "fp32")), trained(made(base, "fp8"))
    assert exact[-1] < 0.9 * exact[0]
    assert fp8 != exact and fp8 == pytest.approx(exact, rel=0.01)


def test_recompute_policies_see_the_columns_of_a_product_in_fp8():
    a, b = torch.zeros(1, 5, 64, dtype=torch.float8_e4m3fn), torch.zeros(96, 64, dtype=torch.float8_e4m3fn)
    given = a, b, torch.ones(()), True
    assert _matmul_width(product_fp8, given) == product_fp8(*given).shape[-1] == 96


def test_a_device_without_fp8_is_refused_with_shards_too(base):
    config = RunConfig(base=base, method="full", quantization="none", compute="fp8")
    for build in (load_backbone, sharded_model):
        with pytest.raises(BackboneError, match=r"compute=fp8 needs an NVIDIA GPU .* and this is a CPU"):
            build(config)
