"""NF4 product: a Triton kernel that multiplies a few rows by an NF4 weight and never writes the dense weight.

Import this module only if Triton is installed. A decoding step multiplies tens of rows by every weight of the base. To
dequantize a weight first costs a write and a read of its 16-bit copy, eight times the bytes of the packed one.

The values are those of `nf4_kernels.unpack`, rounded to the 16-bit dtype of the rows. Products of a long sum are
divided among programs, whose partial sums a second kernel adds in a fixed order.
"""

from __future__ import annotations

from typing import Any

import torch
import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]
from torch import Tensor

from lorafit.backbone.kernels.nf4_kernels import _block_scales, _launch, _present

# mypy: disable-error-code="no-untyped-def, index"

FEATURES, DEPTH, WARPS = 64, 64, 4
"""Output features and inputs of one tile, and warps of a program."""
MOST_ROWS = 128
"""Most rows; with more, dequantizing once and multiplying densely is as fast."""
PROGRAMS, LEAST_STEPS = 256, 4
"""Programs that keep a large GPU busy, and fewest tiles of a program's sum."""
ADDED = 1024
"""Values of one program of the kernel that adds partial sums."""


@triton.jit
def _multiply(
    packed, absmax, nested_code, nested_absmax, nested_offset, table, x, out, rows, features, columns,
    BLOCK: tl.constexpr, NESTED: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr, FEATURES: tl.constexpr,
    DEPTH: tl.constexpr, STEPS: tl.constexpr, BF16: tl.constexpr,
):  # fmt: skip
    """Write x (rows, columns) times the weight (features, columns) to out, or a part of the sum to out[part]."""
    feature = tl.program_id(0) * FEATURES + tl.arange(0, FEATURES)
    part = tl.program_id(1)
    row, depth, byte = tl.arange(0, ROWS), tl.arange(0, DEPTH), tl.arange(0, DEPTH // 2)
    kind: tl.constexpr = tl.bfloat16 if BF16 else tl.float16
    here, known = feature < features, row < rows
    total = tl.full([FEATURES, ROWS], 0.0, tl.float32)
    for step in range(STEPS):
        start = (step * PARTS + part) * DEPTH
        two = tl.load(packed + feature[:, None] * (columns // 2) + (start // 2 + byte)[None, :], here[:, None], 0)
        block = feature * (columns // BLOCK) + start // BLOCK
        scale = _block_scales(absmax, nested_code, nested_absmax, nested_offset, block, here, NESTED)[:, None]
        high = (tl.load(table + (two >> 4).to(tl.int32)) * scale).to(kind)
        low = (tl.load(table + (two & 15).to(tl.int32)) * scale).to(kind)
        weight = tl.reshape(tl.join(high, low), [FEATURES, DEPTH])  # the first of two values is in the high half
        given = tl.load(x + row[None, :] * columns + (start + depth)[:, None], known[None, :], 0.0)
        total = tl.dot(weight, given, total)
    place = out + part.to(tl.int64) * rows * features + row[None, :] * features + feature[:, None]
    tl.store(place, total.to(out.dtype.element_ty), here[:, None] & known[None, :])


@triton.jit
def _add(partial, out, values, PARTS: tl.constexpr, ADDED: tl.constexpr):
    """Write the sums of partial (PARTS, values) to out (values,)."""
    place = tl.program_id(0) * ADDED + tl.arange(0, ADDED)
    mask = place < values
    total = tl.full([ADDED], 0.0, tl.float32)
    for part in tl.static_range(PARTS):
        total += tl.load(partial + part * values + place, mask, 0.0)
    tl.store(out + place, total.to(out.dtype.element_ty), mask)


def multiply(
    x: Tensor, packed: Tensor, scales: tuple[Tensor | None, ...], table: Tensor, block: int, out: Tensor
) -> Tensor:
    """Write `x` (rows, in) times the weight (out, in) of `packed` into `out` (rows, out), and return it.

    `scales` and `table` are as for `nf4_kernels.unpack`. `x` and `out` are contiguous and of one 16-bit dtype; the
    inputs are a multiple of `block`, which is one of DEPTH.
    """
    (rows, columns), features = x.shape, out.shape[1]
    height = max(16, 1 << (rows - 1).bit_length())
    tiles = -(-features // FEATURES)
    parts = parts_of(tiles, columns // DEPTH)
    tensors: tuple[Any, ...] = (packed, *_present(scales), table, x)
    constants = (
        block,
        scales[1] is not None,
        parts,
        height,
        FEATURES,
        DEPTH,
        columns // DEPTH // parts,
        x.dtype is torch.bfloat16,
    )
    sums = out if parts == 1 else x.new_empty(parts, rows, features, dtype=torch.float32)
    _launch(_multiply, (tiles, parts, 1), (*tensors, sums), (rows, features, columns), constants, WARPS)
    if parts > 1:
        values = rows * features
        _launch(_add, (-(-values // ADDED), 1, 1), (sums, out), (values,), (parts, ADDED), WARPS)
    return out


def parts_of(tiles: int, steps: int) -> int:
    """Return the parts of each sum of `steps` tiles: a power of two that gives PROGRAMS programs, if steps allow it."""
    parts = 1
    while tiles * parts < PROGRAMS and steps % (parts * 2) == 0 and steps // (parts * 2) >= LEAST_STEPS:
        parts *= 2
    return parts
