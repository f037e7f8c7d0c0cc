"""The frozen linear op: `x @ dequant(W)ᵀ`, whose backward is `g @ dequant(W)`.

One opaque operator for autograd and torch.compile: neither can keep a dequantised copy of W for backward,
because all that they see is the packed weight. Dequantisation is bitsandbytes' own, step by step as in
`bitsandbytes.functional.dequantize_4bit` (QLoRA, arXiv:2305.14314, section 3).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lorafit.backbone.bits import QuantState, bitsandbytes

NESTED_BLOCK = 256
"""Block size of the second quantisation, fixed in bitsandbytes."""

FEW_ROWS = 16
"""Up to so many rows of x bitsandbytes' fused kernel is the faster one; training has thousands."""

assert bitsandbytes.nn is not None  # importing it registers torch.ops.bitsandbytes


@torch.library.custom_op("lorafit::frozen_linear", mutates_args=())
def frozen_linear(
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
    """`x (…, in) -> (…, out)`, or with `transposed` `x (…, out) -> (…, in)`, in the dtype of `x`.

    `packed` holds W (out, in) in 4 bits with one scale per `block` values. With `nested_*`, `absmax` is itself
    quantised to 8 bits (double quantisation).
    """
    rows = x.numel() // x.shape[-1] if x.shape[-1] else 0
    if x.is_cuda and not transposed and 0 < rows <= FEW_ROWS and in_features % block == 0:
        return few_rows(x, packed, absmax, nested_code, nested_absmax, nested_offset, out_features, block, quant_type)
    scales = _scales(absmax, nested_code, nested_absmax, nested_offset)
    weight = _unpacked(packed, scales, block, quant_type, out_features, in_features, x.dtype)
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


@frozen_linear.register_fake
def _(
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
    return x.new_empty(*x.shape[:-1], in_features if transposed else out_features)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, *weight, out_features, in_features, block, quant_type, transposed = inputs
    ctx.save_for_backward(*weight)
    ctx.layout, ctx.transposed = (out_features, in_features, block, quant_type), transposed


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_x = frozen_linear(grad.contiguous(), *ctx.saved_tensors, *ctx.layout, not ctx.transposed)
    return (grad_x, *(None,) * 10)


frozen_linear.register_autograd(_gradient, setup_context=_remember)


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
    _, absmax, *nested, out_features, in_features, block, quant_type = op_arguments(packed, state)
    return _unpacked(packed, _scales(absmax, *nested), block, quant_type, out_features, in_features, dtype)


def _scales(absmax: Tensor, code: Tensor | None, nested_absmax: Tensor | None, offset: Tensor | None) -> Tensor:
    if code is None:
        return absmax.float()
    plain = torch.ops.bitsandbytes.dequantize_blockwise.default(
        absmax, nested_absmax, code, NESTED_BLOCK, torch.float32
    )
    return plain + offset


def _unpacked(
    packed: Tensor, scales: Tensor, block: int, quant_type: str, rows: int, columns: int, dtype: torch.dtype
) -> Tensor:
    column = packed.reshape(-1, 1)
    return torch.ops.bitsandbytes.dequantize_4bit.default(column, scales, block, quant_type, [rows, columns], dtype)
