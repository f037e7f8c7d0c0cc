"""FP8 trained linear: operands of all three products in 8 bits, with one scale for each tensor.

y = x8 @ W8ᵀ, and backward ∂x = g8 @ W8 and ∂W = g8ᵀ @ x8, each times the scales of its operands (Micikevicius et al.,
arXiv:2209.05433). Activations and weights are in e4m3; gradients in e5m2, whose range is wider. Scales are powers of
two: rounding is then the same for every scale, so that a row is rounded alike in every micro-batch (only numbers
below 2^-14 of the largest lose bits). Quantizing is plain torch, so that torch.compile fuses it with its neighbours
and does it once for several projections of one input. The product is one opaque op.

One scale a tensor, not a row, because Hopper multiplies so faster, and a tensor needs one scale for both directions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lorafit.backbone.kernels.frozen_linear_fp8 import MULTIPLE
from lorafit.backbone.kernels.frozen_linear_op import E4M3, LIBRARY

E5M2 = torch.float8_e5m2

SCHEMA = "product_fp8(Tensor a, Tensor b, Tensor scale, bool is_fast) -> Tensor"
LIBRARY.define(SCHEMA, tags=[torch.Tag.pt2_compliant_tag])


class TrainedLinearFp8(nn.Linear):
    """Multiply in FP8, forward and backward. The weight and the bias stay in the precision they train in."""

    def forward(self, x: Tensor) -> Tensor:
        """Return `x (…, in) -> (…, out)`."""
        y = linear_fp8(x, self.weight)
        return y if self.bias is None else y + self.bias


def takes_fp8(linear: nn.Linear) -> bool:
    """Return True if the widths of `linear` are multiples of 16, as `torch._scaled_mm` needs them."""
    return linear.in_features % MULTIPLE == 0 and linear.out_features % MULTIPLE == 0


def linear_fp8(x: Tensor, weight: Tensor) -> Tensor:
    """Return `x (…, in) -> (…, out)` for `weight (out, in)`, in the dtype of `x`.

    The gradients are in the dtypes of `x` and `weight`.
    """
    result: Tensor = _LinearFp8.apply(x, weight)
    return result


class _LinearFp8(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        # with a rank of 3, as the stream has, recompute policies keep no weight in FP8 for the backward
        stacked = weight[None]
        of_x, of_weight = _factor(x), _factor(stacked)
        ctx.save_for_backward(x, weight, of_x, of_weight)
        y = product_fp8(_rounded(x, of_x), _rounded(stacked, of_weight)[0], 1 / (of_x * of_weight), True)
        # torch 2.11 compiles a conversion that changes nothing to an output without a gradient
        return y if y.dtype == x.dtype else y.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        (grad,), (x, weight, of_x, of_weight) = grads, ctx.saved_tensors
        of_grad = _factor(grad) * 128.0  # the largest e5m2 number is 57,344, and the largest e4m3 one 448
        by_weight, by_x = 1 / (of_grad * of_weight), 1 / (of_grad * of_x)
        grad_x = product_fp8(_rounded(grad, of_grad, E5M2), _columns(weight, of_weight), by_weight, True)
        # this one sums over all tokens, so it is summed in full precision
        grad_weight = product_fp8(_columns(grad, of_grad, E5M2), _columns(x, of_x), by_x, False)
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype)


def _factor(x: Tensor) -> Tensor:
    """Return the power of two (fp32, no dimensions) that brings the largest number of `x` to at most 448.

    Rows are reduced first, so that the kernel that makes `x` does it on its way. Below 2^-100 the factor would be
    infinite.
    """
    largest = x.abs().amax(-1).amax().float().clamp_min(2.0**-100)
    # the exponent alone; the numbers are literals for the reason given in frozen_linear_fp8.py
    return ((448.0 / largest).view(torch.int32) & 0x7F800000).view(torch.float32)


def _rounded(x: Tensor, factor: Tensor, dtype: torch.dtype = E4M3) -> Tensor:
    return (x.float() * factor).to(dtype)


def _columns(x: Tensor, factor: Tensor, dtype: torch.dtype = E4M3) -> Tensor:
    """Return the columns of `x (…, n)` in FP8 as rows: (n, rows), with zeros up to a multiple of 16."""
    rows = (x.reshape(-1, x.shape[-1]).float() * factor).t()
    return nn.functional.pad(rows, (0, -rows.shape[1] % 16)).to(dtype).contiguous()


def _product_fp8(a: Tensor, b: Tensor, scale: Tensor, is_fast: bool) -> Tensor:
    rows = a.reshape(-1, a.shape[-1])
    shape = (*a.shape[:-1], len(b))
    if not a.numel():
        return torch.zeros(shape, dtype=torch.bfloat16, device=a.device)
    if not a.is_cuda:
        return (rows.float() @ b.float().t() * scale).bfloat16().reshape(shape)
    one = torch.ones_like(scale)
    y = torch._scaled_mm(rows, b.t(), scale_a=scale, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=is_fast)
    return y.reshape(shape)


def _shape_only(a: Tensor, b: Tensor, scale: Tensor, is_fast: bool) -> Tensor:
    return a.new_empty(*a.shape[:-1], b.shape[0], dtype=torch.bfloat16)


LIBRARY.impl("product_fp8", _product_fp8, "CompositeExplicitAutograd")
torch.library.register_fake("lorafit::product_fp8", _shape_only, lib=LIBRARY)

product_fp8 = torch.ops.lorafit.product_fp8.default
"""Multiply `a (…, k)` by `b (n, k)ᵀ`, both contiguous and in FP8, times `scale`: `(…, n)` in bf16.

Without `is_fast` a GPU adds its partial sums in fp32. A CPU does the same arithmetic with an exact sum.
"""
