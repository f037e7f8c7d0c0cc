"""Grouped product: rows sorted by expert times each expert's frozen 4-bit matrix.

The weights of one layer are dequantized for the product and again for its gradient, so nothing dense stays between
layers.
"""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

from lorafit.backbone.kernels.frozen_linear_op import LIBRARY, linear_of

CAPABILITY = (8, 0)
"""Compute capability of the oldest GPUs with torch's grouped matmul."""
ALIGNMENT = 16
"""Bytes to which torch's grouped matmul needs the rows of its operands aligned."""


class StackedWeights(Protocol):
    """A layer that holds the matrices of all experts in 4 bits."""

    def matrices(self) -> Tensor:
        """Return the dense weights (experts, out, in) in the compute dtype; a view of their storage."""


def grouped_matmul(x: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    """Return `x (rows, in) -> (rows, out)`, rows of group e times `weights[e]`; weights (groups, in, out).

    Group e has the rows from `offsets[e - 1]` up to `offsets[e]`; offsets (groups,) int32.
    """
    if _takes(x, weights):
        return torch.nn.functional.grouped_mm(x, weights, offs=offsets)
    out = x.new_zeros(len(x), weights.shape[2])
    for group, (begin, end) in enumerate(pairwise([0, *offsets.tolist()])):
        if begin < end:
            torch.mm(x[begin:end], weights[group], out=out[begin:end])
    return out


def _takes(x: Tensor, weights: Tensor) -> bool:
    """Return True if torch's grouped matmul takes the operands; other ones are multiplied group by group."""
    if not (x.is_cuda and x.dtype is weights.dtype is torch.bfloat16 and _has_kernel(x.device.index)):
        return False
    widths = (x.shape[1], weights.shape[1], weights.shape[2])
    return all(width * x.element_size() % ALIGNMENT == 0 for width in widths)


@cache
def _has_kernel(device: int) -> bool:
    return hasattr(torch.nn.functional, "grouped_mm") and torch.cuda.get_device_capability(device) >= CAPABILITY


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
