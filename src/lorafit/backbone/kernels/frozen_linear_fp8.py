"""FP8 frozen linear: NF4 weights dequantized to e4m3, activations and gradients quantized row by row.

W ≈ s ⊙ W8 with one scale s per output feature, and the same e4m3 values W8 serve both directions:
y = (x8 @ W8ᵀ) · x_scale · s, and the gradient folds s into g before it is quantized: (g·s)8 @ W8 · g_scale.
Quantizing is plain torch, so that torch.compile fuses it with its neighbours and does it once for several
projections of one input. Making W8 and multiplying by it is one opaque op, so that only the layer itself keeps
W8, if there is memory to spare.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lorafit.backbone.bitsandbytes_import import QuantState
from lorafit.backbone.kernels.frozen_linear_op import (
    E4M3,
    LIBRARY,
    block_scales,
    frozen_linear,
    frozen_product,
    linear_of,
    op_arguments,
    unpack_e4m3,
)
from lorafit.backbone.kernels.grouped_product import frozen_grouped

MULTIPLE = 16
"""Factor of the matrix widths that `torch._scaled_mm` accepts."""

SCHEMA = (
    "frozen_linear_fp8(Tensor x, Tensor x_scale, Tensor row_scales, Tensor handle, SymInt out_features,"
    " SymInt in_features, bool transposed) -> Tensor"
)
LIBRARY.define(SCHEMA, tags=[torch.Tag.pt2_compliant_tag])


def fp8_linear(x: Tensor, row_scales: Tensor, handle: Tensor, out_features: int, in_features: int) -> Tensor:
    """Return `x (…, in) -> (…, out)` in bf16.

    The gradient to `x` is in the dtype of `x`.
    """
    result: Tensor = _Fp8Linear.apply(x, row_scales, handle, out_features, in_features)
    return result


class _Fp8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, row_scales: Tensor, handle: Tensor, out_features: int, in_features: int) -> Tensor:
        ctx.save_for_backward(row_scales, handle)
        ctx.features = out_features, in_features
        return frozen_linear_fp8(*quantized_rows(x), row_scales, handle, out_features, in_features, False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        row_scales, handle = ctx.saved_tensors
        scaled = grads[0] * row_scales[0]
        grad_x = frozen_linear_fp8(*quantized_rows(scaled), row_scales, handle, *ctx.features, True)
        return grad_x.to(grads[0].dtype), None, None, None, None


def quantized_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return `x (…, n)` in e4m3, and the fp32 scale (…, 1) of each row.

    Their product is nearly `x`.
    """
    narrow, wide = _scales_of(x.abs().amax(-1, keepdim=True).float())
    # no value can exceed 448 by more than a rounding error, so none needs clamping
    return (x.float() * narrow).to(E4M3), wide


def _scales_of(largest: Tensor) -> tuple[Tensor, Tensor]:
    """Return the factors that bring numbers of up to `largest` (fp32) into e4m3 and back.

    The largest e4m3 number is 448. Below 2^-100 the first factor would be infinite. The numbers are literals because
    torch.compile treats a module's floats as variables, and then fails to trace an autograd.Function that is called
    twice (torch 2.11 and 2.13).
    """
    largest = largest.clamp_min(2.0**-100)
    return 448.0 / largest, largest / 448.0


def fp8_row_scales(packed: Tensor, state: QuantState) -> Tensor | None:
    """Return (2, out) fp32: the scale of each output feature, and its inverse.

    None for a weight that FP8 does not support.
    """
    _, *scales, out_features, in_features, block, quant_type = op_arguments(packed, state)
    fits = out_features % MULTIPLE == 0 and in_features % MULTIPLE == 0 and in_features % block == 0
    if quant_type != "nf4" or packed.dtype != torch.uint8 or not fits:
        return None
    # every block holds a code of ±1, so its scale is its largest number
    inverse, scale = _scales_of(block_scales(tuple(scales)).reshape(out_features, -1).abs().amax(1))
    return torch.stack([scale, inverse])


def _frozen_linear_fp8(
    x: Tensor,
    x_scale: Tensor,
    row_scales: Tensor,
    handle: Tensor,
    out_features: int,
    in_features: int,
    transposed: bool,
) -> Tensor:
    linear = linear_of(handle)
    copies = linear.copies
    if copies:
        weight = copies[transposed]
    else:
        packed, *scales, _, _, block, _ = linear.packed()
        weight = unpack_e4m3(packed, tuple(scales), block, row_scales[1], in_features, transposed)
    scale = _ones(in_features, x.device) if transposed else row_scales[:1]
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    y = _multiply(rows, weight, x_scale.reshape(-1, 1).contiguous(), scale)
    return y.reshape(*x.shape[:-1], len(weight))


def _multiply(x: Tensor, weight: Tensor, x_scale: Tensor, weight_scale: Tensor) -> Tensor:
    """Return `x (m, k) @ weight (n, k)ᵀ · x_scale (m, 1) · weight_scale (1, n)` in bf16."""
    if not x.numel():
        return x.new_empty(len(x), len(weight), dtype=torch.bfloat16)
    if x.is_cuda:
        return torch._scaled_mm(
            x, weight.t(), scale_a=x_scale, scale_b=weight_scale, out_dtype=torch.bfloat16, use_fast_accum=True
        )
    return (x.float() @ weight.float().t() * x_scale * weight_scale).bfloat16()


@cache
def _ones(count: int, device: torch.device) -> Tensor:
    return torch.ones(1, count, device=device)


def _shape_only(x: Tensor, *weight: Any) -> Tensor:
    out_features, in_features, transposed = weight[3:]
    return x.new_empty(*x.shape[:-1], in_features if transposed else out_features, dtype=torch.bfloat16)


LIBRARY.impl("frozen_linear_fp8", _frozen_linear_fp8, "CompositeExplicitAutograd")
torch.library.register_fake("lorafit::frozen_linear_fp8", _shape_only, lib=LIBRARY)

frozen_linear_fp8 = torch.ops.lorafit.frozen_linear_fp8.default
"""Multiply `x (…, in)` e4m3 with `x_scale (…, 1)` by the weight behind `handle`: `(…, out)` in bf16.

With `transposed` it is `x (…, out) -> (…, in)`, without the rows' scales. `row_scales` are those of `fp8_row_scales`.
"""


def frozen_features(op: Any, arguments: Sequence[Any]) -> tuple[int, int] | None:
    """Return (in_features, out_features) of a frozen matmul's forward, by the called operator and its arguments.

    None for any other operator, and for a frozen linear's backward. Recompute policies read it.
    """
    if op in (frozen_product, frozen_linear_fp8, frozen_grouped):
        *_, out_features, in_features, transposed = arguments
    elif op is frozen_linear:
        *_, out_features, in_features, _, _, transposed = arguments
    else:
        return None
    return None if transposed else (in_features, out_features)
