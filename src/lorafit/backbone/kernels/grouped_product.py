"""Grouped product: rows sorted by expert times each expert's frozen 4-bit matrix.

The weights of one layer are dequantized for the product and again for its gradient, so nothing dense stays between
layers.
"""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from lorafit.backbone.kernels.frozen_linear_op import LIBRARY, linear_of

CAPABILITY = (8, 0)
"""Compute capability of the oldest GPUs with torch's grouped matmul."""
ALIGNMENT = 16
"""Bytes to which torch's grouped matmul needs the rows of its operands aligned."""


def grouped_matmul(x: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    """Return `x (rows, in) -> (rows, out)`, rows of group e times `weights[e]`; weights (groups, in, out).

    Group e has the rows from `offsets[e - 1]` up to `offsets[e]`; offsets (groups,) int32.
    """
    if _takes(x, *weights.shape[1:]):
        return torch.nn.functional.grouped_mm(x, weights, offs=offsets)
    return _one_by_one(x, weights, offsets)


def _one_by_one(x: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    out = x.new_zeros(len(x), weights.shape[2])
    for group, (begin, end) in enumerate(pairwise([0, *offsets.tolist()])):
        if begin < end:
            torch.mm(x[begin:end], weights[group], out=out[begin:end])
    return out


def grouped_outer(x: Tensor, grad: Tensor, offsets: Tensor) -> Tensor:
    """Return `xᵀ @ grad` of each group's rows, (groups, in, out): the gradient of the weights of `grouped_matmul`."""
    if _takes(x, x.shape[1], grad.shape[1]):
        out = torch.nn.functional.grouped_mm(x.t(), grad, offs=offsets)
        # a group without rows may be left as it was in memory
        return out.masked_fill_((offsets.diff(prepend=offsets.new_zeros(1)) == 0)[:, None, None], 0)
    out = x.new_zeros(len(offsets), x.shape[1], grad.shape[1])
    for group, (begin, end) in enumerate(pairwise([0, *offsets.tolist()])):
        torch.mm(x[begin:end].t(), grad[begin:end], out=out[group])
    return out


def _takes(x: Tensor, *widths: int) -> bool:
    """Return True if torch's grouped matmul takes the operands; other ones are multiplied group by group."""
    fits = x.is_cuda and x.dtype is torch.bfloat16 and _has_kernel(x.device.index)
    return fits and all(width * x.element_size() % ALIGNMENT == 0 for width in widths)


@cache
def _has_kernel(device: int) -> bool:
    """Return True if torch's grouped matmul works on GPU `device`, with groups of any size."""
    if not hasattr(torch.nn.functional, "grouped_mm") or torch.cuda.get_device_capability(device) < CAPABILITY:
        return False
    x, grad = (torch.linspace(-1, 1, 37 * width).sin().view(37, width).bfloat16() for width in (16, 24))
    weights = torch.linspace(-2, 2, 4 * 16 * 24).cos().view(4, 16, 24).bfloat16()
    offsets = torch.tensor([5, 5, 30, 37], dtype=torch.int32)
    place = torch.device("cuda", device)
    try:
        forward = torch.nn.functional.grouped_mm(x.to(place), weights.to(place), offs=offsets.to(place)).cpu()
        backward = torch.nn.functional.grouped_mm(x.to(place).t(), grad.to(place), offs=offsets.to(place)).cpu()
    except RuntimeError:
        return False
    close = torch.allclose(forward, _one_by_one(x, weights, offsets), atol=0.05, rtol=0.05)
    parts = [x[begin:end].float().t() @ grad[begin:end].float() for begin, end in ((0, 5), (5, 30), (30, 37))]
    return close and torch.allclose(backward[[0, 2, 3]].float(), torch.stack(parts), atol=0.05, rtol=0.05)


SCHEMA = (
    "frozen_grouped(Tensor x, Tensor offsets, Tensor handle, SymInt out_features, SymInt in_features, bool transposed)"
    " -> Tensor"
)
LIBRARY.define(SCHEMA, tags=[torch.Tag.pt2_compliant_tag])


def _frozen_grouped(
    x: Tensor, offsets: Tensor, handle: Tensor, out_features: int, in_features: int, transposed: bool
) -> Tensor:
    linear: Any = linear_of(handle)
    weights = linear.matrices()
    return grouped_matmul(x.contiguous(), weights if transposed else weights.transpose(1, 2), offsets)


def _shape_only(
    x: Tensor, offsets: Tensor, handle: Tensor, out_features: int, in_features: int, transposed: bool
) -> Tensor:
    return x.new_empty(x.shape[0], in_features if transposed else out_features)


LIBRARY.impl("frozen_grouped", _frozen_grouped, "CompositeExplicitAutograd")
torch.library.register_fake("lorafit::frozen_grouped", _shape_only, lib=LIBRARY)

frozen_grouped = torch.ops.lorafit.frozen_grouped.default
"""Multiply `x (rows, in) -> (rows, out)` by the experts behind `handle`, without a gradient.

Rows are sorted by expert (see `grouped_matmul`). With `transposed` it is `x (rows, out) -> (rows, in)`.
"""


def grouped_product(x: Tensor, offsets: Tensor, handle: Tensor, out_features: int, in_features: int) -> Tensor:
    """Return `x (rows, in) -> (rows, out)` by the frozen experts behind `handle`; the gradient flows to `x` only."""
    result: Tensor = _GroupedProduct.apply(x, offsets, handle, out_features, in_features)
    return result


class _GroupedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, offsets: Tensor, handle: Tensor, out_features: int, in_features: int) -> Tensor:
        ctx.save_for_backward(offsets, handle)
        ctx.features = out_features, in_features
        return frozen_grouped(x, offsets, handle, out_features, in_features, False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        offsets, handle = ctx.saved_tensors
        grad_x = frozen_grouped(grads[0].contiguous(), offsets, handle, *ctx.features, True)
        return grad_x, None, None, None, None


LIBRARY.define("grouped_matmul(Tensor x, Tensor weights, Tensor offsets) -> Tensor", tags=[torch.Tag.pt2_compliant_tag])
LIBRARY.define("grouped_outer(Tensor x, Tensor grad, Tensor offsets) -> Tensor", tags=[torch.Tag.pt2_compliant_tag])
LIBRARY.impl("grouped_matmul", grouped_matmul, "CompositeExplicitAutograd")
LIBRARY.impl("grouped_outer", grouped_outer, "CompositeExplicitAutograd")


@torch.library.register_fake("lorafit::grouped_matmul", lib=LIBRARY)
def _matmul_shape(x: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weights.shape[2])


@torch.library.register_fake("lorafit::grouped_outer", lib=LIBRARY)
def _outer_shape(x: Tensor, grad: Tensor, offsets: Tensor) -> Tensor:
    return x.new_empty(offsets.shape[0], x.shape[1], grad.shape[1])


def grouped_linear(x: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    """Return `grouped_matmul` with a gradient to `x` and to `weights` (groups, in, out), which are contiguous."""
    result: Tensor = _GroupedLinear.apply(x, weights, offsets)
    return result


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
        ctx.save_for_backward(x, weights, offsets)
        result: Tensor = torch.ops.lorafit.grouped_matmul.default(x.contiguous(), weights, offsets)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weights, offsets = ctx.saved_tensors
        grad = grads[0].contiguous()
        grad_x = torch.ops.lorafit.grouped_matmul.default(grad, weights.transpose(1, 2), offsets)
        return grad_x, torch.ops.lorafit.grouped_outer.default(x.contiguous(), grad, offsets), None
