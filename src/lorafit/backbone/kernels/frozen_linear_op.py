"""The frozen linear operator: `x @ dequantize(W)ᵀ`, whose backward is `g @ dequantize(W)`; weights go in by handle."""

from __future__ import annotations

from itertools import count
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from lorafit.backbone.bitsandbytes_import import QuantState
from lorafit.backbone.kernels.nf4 import NESTED_BLOCK, unpack_weight


class Holder(Protocol):
    """What has a packed weight."""

    _handle: Tensor

    def packed(self) -> tuple[Any, ...]:
        """The arguments of `frozen_linear` between `x` and `transposed`, as they are now, in plain tensors."""

    @property
    def copies(self) -> tuple[Tensor, ...]:
        """What is kept unpacked of it: nothing, the dense weight, or in FP8 the e4m3 one and its transpose."""

    @property
    def dense(self) -> Tensor | None:
        """The dense weight, where that is kept."""


_NUMBERS = count()
_HOLDERS: WeakValueDictionary[int, Holder] = WeakValueDictionary()


def handle_for(holder: Holder, device: torch.device) -> Tensor:
    """A new handle (1,) int64 for the weight of `holder`, which lies on `device`; good while `holder` lives.

    It lies there too, if that is a card: where one input of an operator is no tensor of the card's, the compiler takes
    the operator's output for unaligned, and what reads it for unable to load 16 bytes at a time (`has_unaligned_input`
    in torch/_inductor/ir.py). There it is known by its address, since reading it would wait for the card.
    """
    number = next(_NUMBERS)
    handle = torch.tensor([number], device=handle_device(device))
    _HOLDERS[number] = holder
    if handle.is_cuda:
        _HOLDERS[handle.data_ptr()] = holder
    return handle


def handle_device(weight: torch.device) -> torch.device:
    """Where the handle of a weight lies: on the weight's card, else where a loader may not have it, on the CPU."""
    return weight if weight.type == "cuda" else torch.device("cpu")


def holder_of(handle: Tensor) -> Holder:
    """What has the weight that `handle` stands for."""
    holder = _HOLDERS.get(handle.data_ptr()) if handle.is_cuda else None
    # at an address may lie another handle than the one that was entered there, if that was replaced since
    if holder is None or holder._handle.data_ptr() != handle.data_ptr():
        holder = _HOLDERS.get(int(handle.item()))
    assert holder is not None, "the layer of a frozen weight is gone before its backward ran"
    return holder


FEW_ROWS = 16
"""Up to so many rows of x bitsandbytes' fused kernel is the faster one; training has thousands."""

TENSORS = 5
"""Tensors among what `op_arguments` returns; numbers follow."""

SCHEMA = (
    "frozen_linear(Tensor x, Tensor packed, Tensor absmax, Tensor? nested_code, Tensor? nested_absmax,"
    " Tensor? nested_offset, SymInt out_features, SymInt in_features, SymInt block, str quant_type,"
    " bool transposed) -> Tensor"
)

# a bare Library, for torch.library.custom_op costs 28 µs a call here and this 18 (compiled code, one core of a
# server CPU), and a step of an 8B model calls it 448 times
LIBRARY = torch.library.Library("lorafit", "FRAGMENT")
LIBRARY.define(SCHEMA, tags=[torch.Tag.pt2_compliant_tag])


def _frozen_linear(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_code: Tensor | None,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    out_features: int,
    in_features: int,
    block: int,
    quant_type: str,
    transposed: bool,
) -> Tensor:
    rows = x.numel() // x.shape[-1] if x.shape[-1] else 0
    if x.is_cuda and not transposed and 0 < rows <= FEW_ROWS and in_features % block == 0:
        return few_rows(x, packed, absmax, nested_code, nested_absmax, nested_offset, out_features, block, quant_type)
    scales = (absmax, nested_code, nested_absmax, nested_offset)
    weight = unpack_weight(packed, scales, block, quant_type, out_features, in_features, x.dtype)
    return x @ (weight if transposed else weight.t())


def few_rows(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_code: Tensor | None,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    out_features: int,
    block: int,
    quant_type: str,
) -> Tensor:
    """`x (…, in) -> (…, out)` in one kernel that never writes the dense weight: what generation spends its time on."""
    nested = nested_code is not None
    return torch.ops.bitsandbytes.gemm_4bit.default(
        x.contiguous(),
        packed.reshape(-1, 1),
        [out_features, x.shape[-1]],
        nested_absmax if nested else absmax,
        block,
        quant_type,
        absmax_8bit=absmax if nested else None,
        absmax_code=nested_code,
        absmax_offset=nested_offset,
    )


def _shape_only(x: Tensor, *weight: Any) -> Tensor:
    out_features, in_features, _, _, transposed = weight[5:]
    return x.new_empty(*x.shape[:-1], in_features if transposed else out_features)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, *weight, transposed = inputs
    ctx.save_for_backward(*weight[:TENSORS])
    ctx.layout, ctx.transposed = weight[TENSORS:], transposed


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_x = frozen_linear(grad.contiguous(), *ctx.saved_tensors, *ctx.layout, not ctx.transposed)
    return (grad_x, *(None,) * 10)


LIBRARY.impl("frozen_linear", _frozen_linear, "CompositeExplicitAutograd")
torch.library.register_fake("lorafit::frozen_linear", _shape_only, lib=LIBRARY)
torch.library.register_autograd("lorafit::frozen_linear", _gradient, setup_context=_remember, lib=LIBRARY)

frozen_linear = torch.ops.lorafit.frozen_linear.default
"""`x (…, in) -> (…, out)`, or with `transposed` `x (…, out) -> (…, in)`, in the dtype of `x`; see SCHEMA.

`packed` holds W (out, in) in 4 bits with one scale per `block` values. With `nested_*`, `absmax` is itself
quantised to 8 bits (double quantisation). The gradient flows to `x` only.
"""


PRODUCT = "frozen_product(Tensor x, Tensor handle, SymInt out_features, SymInt in_features, bool transposed) -> Tensor"
LIBRARY.define(PRODUCT, tags=[torch.Tag.pt2_compliant_tag])


def _frozen_product(x: Tensor, handle: Tensor, out_features: int, in_features: int, transposed: bool) -> Tensor:
    holder = holder_of(handle)
    dense = holder.dense
    if dense is not None:
        return x @ (dense if transposed else dense.t())
    arguments = (x, *holder.packed(), transposed)
    return _frozen_linear(*arguments)


def _product_shape(x: Tensor, handle: Tensor, out_features: int, in_features: int, transposed: bool) -> Tensor:
    return x.new_empty(*x.shape[:-1], in_features if transposed else out_features)


LIBRARY.impl("frozen_product", _frozen_product, "CompositeExplicitAutograd")
torch.library.register_fake("lorafit::frozen_product", _product_shape, lib=LIBRARY)

frozen_product = torch.ops.lorafit.frozen_product.default
"""`frozen_linear` by a weight's handle, and without a gradient of its own: what compiled code calls, sparing it four
tensors a weight, and the way through autograd's Python on each of the hundreds of calls of a step. Where the weight's
layer keeps a dense copy, it multiplies by that."""


def traced_linear(x: Tensor, handle: Tensor, out_features: int, in_features: int) -> Tensor:
    """`frozen_linear` by the weight behind `handle` for code that is being compiled, with the same gradient."""
    result: Tensor = _TracedLinear.apply(x, handle, out_features, in_features)
    return result


class _TracedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, handle: Tensor, out_features: int, in_features: int) -> Tensor:
        ctx.save_for_backward(handle)
        ctx.features = out_features, in_features
        return frozen_product(x, handle, out_features, in_features, False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (handle,) = ctx.saved_tensors
        return frozen_product(grads[0].contiguous(), handle, *ctx.features, True), None, None, None


def op_arguments(packed: Tensor, state: QuantState) -> tuple[Any, ...]:
    """The arguments of `frozen_linear` between `x` and `transposed`, for a weight that bitsandbytes packed."""
    if state.nested:
        assert state.state2.blocksize == NESTED_BLOCK, state.state2.blocksize
        nested = (state.state2.code, state.state2.absmax, state.offset)
    else:
        nested = (None, None, None)
    return (packed, state.absmax, *nested, *state.shape, state.blocksize, state.quant_type)


def unpack(packed: Tensor, state: QuantState, dtype: torch.dtype) -> Tensor:
    """The dense weight (out, in) in `dtype`: what the op multiplies by."""
    _, *scales, out_features, in_features, block, quant_type = op_arguments(packed, state)
    return unpack_weight(packed, tuple(scales), block, quant_type, out_features, in_features, dtype)
