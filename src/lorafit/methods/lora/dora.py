"""dora: weight-decomposed adapters, `m / ‖W + scale · B @ A‖ · (W + scale · B @ A)` (Liu et al., arXiv:2402.09353).

PEFT makes each weight and its delta dense in every forward pass to measure the rows' norms. Here the norms come of
products with A: ‖w + s b A‖² = ‖w‖² + 2 s (W Aᵀ) · b + s² b (A Aᵀ) bᵀ, so that a 4-bit base stays in 4 bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorafit.backbone import FrozenLinear4bit, dequantize, redirect_library_logs

with redirect_library_logs():
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.variants import DoraLinearVariant

MAGNITUDE = "lora_magnitude_vector"
"""PEFT's name of the magnitudes (out,)."""


class FrozenDora(DoraLinearVariant):
    """Compute PEFT's DoRA over a frozen base without a dense weight."""

    @staticmethod
    def forward(module: Any, *, active_adapter: str, x: Tensor, result: Tensor, **unused: Any) -> Tensor:
        """Return the output (…, out) of the scaled weights, in the dtype of `result`, the base's own output.

        As in PEFT, dropout acts on the input of all that the adapter adds, the rescaled base included.
        """
        dropout, base = module.lora_dropout[active_adapter], module.get_base_layer()
        scale, a, b = module.scaling[active_adapter], module.lora_A[active_adapter], module.lora_B[active_adapter]
        if isinstance(dropout, nn.Identity) or not module.training:
            unscaled = result if base.bias is None else result - base.bias
        else:
            x = dropout(x)
            unscaled = _product(base, x)
        magnitude = module.lora_magnitude_vector[active_adapter]
        ratio = magnitude.weight / row_norms(base, magnitude.squares, a.weight, b.weight, scale)
        tuned = unscaled + scale * b(a(x))
        return (result + (ratio * tuned - unscaled)).to(result.dtype)


def prepare_dora(adapted: PeftModel, *, is_new: bool) -> None:
    """Let the DoRA layers of `adapted` compute as `FrozenDora`; `is_new` sets each magnitude to its row's norm."""
    for module in adapted.modules():
        if not isinstance(module, LoraLayer):
            continue
        for name, variant in module.lora_variant.items():
            assert isinstance(variant, DoraLinearVariant), type(variant)
            module.lora_variant[name] = FrozenDora()
            layer = module.lora_magnitude_vector[name]
            squares = dense_weight(module.get_base_layer()).square().sum(1)
            layer.register_buffer("squares", squares, persistent=False)
            own = squares.sqrt() if is_new else layer.weight.data.float()
            layer.weight = nn.Parameter(own, requires_grad=layer.weight.requires_grad)


@torch.no_grad()
def row_norms(base: Any, squares: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Return the norm of each row of W + scale · B @ A, as (out,) in fp32.

    `squares` (out,) holds ‖w‖² of each row of W (out, in); A is (r, in), B is (out, r). No gradient flows through
    the norms, as in section 4.3 of the paper.
    """
    with torch.autocast(a.device.type, enabled=False):
        through = _product(base, a).float()  # (r, out)
        crossed = (b * through.T).sum(1)
        own = (b @ (a @ a.T) * b).sum(1)
    return (squares + 2 * scale * crossed + scale * scale * own).clamp_min(0).sqrt()


def rescaled(weight: Tensor, magnitude: Tensor) -> Tensor:
    """Return `weight` (out, in), fp32, with rows of the lengths `magnitude` (out,)."""
    return weight * (magnitude.to(weight.device) / torch.linalg.norm(weight, dim=1))[:, None]


def dense_weight(linear: Any) -> Tensor:
    """Return the weight (out, in) of a plain or 4-bit linear in fp32."""
    if isinstance(linear, FrozenLinear4bit):
        return dequantize(linear, linear.compute_dtype).float()
    weight: Tensor = linear.weight.detach().float()
    return weight.T if isinstance(linear, Conv1D) else weight


def _product(base: Any, x: Tensor) -> Tensor:
    """Return `x @ Wᵀ` (…, out) of a frozen linear, without its bias."""
    if not isinstance(base, FrozenLinear4bit) and not torch.is_autocast_enabled(x.device.type):
        x = x.to(base.weight.dtype)
    y: Tensor = base(x)
    return y if base.bias is None else y - base.bias
