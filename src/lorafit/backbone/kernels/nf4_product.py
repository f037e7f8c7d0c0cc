"""NF4 product: up to 64 rows times a packed weight, in one kernel that never writes the dense weight. Hopper only.

Import this module only if Triton has Gluon. A decoding step of 64 texts reads every weight once. Dequantizing first
writes and reads four times the packed bytes; here a thread looks its codes up in registers, and they go to the tensor
cores from there.

How it works. A program computes 64 output features over a part of the columns, as W (64, k) times xᵀ (k, 64). A thread
loads 4-byte words of W straight into the layout that the matrix instruction wants of its left operand, and takes place
j of all its words as one operand of 16 columns: columns j, 8 + j, 16 + j, … of the weight. `_permute` puts the columns
of x into that order. A code's value comes from a shuffle: lane i of a warp holds value i. Codes of later words are
loaded before the earlier ones are used, and x comes through a ring in shared memory.

Parts of the columns are summed by the program that ends last, in a fixed order, so that the bits are always the same.
The weights are rounded as `nf4_kernels` rounds them; only the order of the sums differs from a dense product.
"""

from __future__ import annotations

import torch
import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]
from torch import Tensor
from triton.experimental import gluon  # type: ignore[import-not-found, import-untyped, unused-ignore]
from triton.experimental.gluon import language as gl  # type: ignore[import-not-found, import-untyped, unused-ignore]
from triton.experimental.gluon.language.nvidia.hopper import (  # type: ignore[import-not-found, import-untyped, unused-ignore]
    async_copy,
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from lorafit.backbone.kernels.frozen_linear_op import MOST_ROWS

# mypy: disable-error-code="no-untyped-def, index"

ROWS = MOST_ROWS
"""Width of the matrix instruction."""
FEATURES, COLUMNS, WARPS = 64, 128, 4
"""Output features of a program, columns of a step, warps of a program."""
STAGES = 3
"""Steps of x in shared memory."""
AHEAD = 2
"""Steps by which words are loaded early."""
assert (COLUMNS, AHEAD) == (128, 2), "_product names the words of each step, and _step the columns of each product"
PROGRAMS = 256
"""Programs that fill a GPU of 132 multiprocessors about twice; more would only add partial sums."""
SCALE_BLOCK = 64

# names that Triton 3.6 to 3.8 give to the same
_copy = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
_barrier = getattr(gl, "barrier", None) or gl.thread_barrier


def takes_shape(out_features: int, in_features: int) -> bool:
    """Return True if the kernel can multiply by a weight of this shape."""
    return out_features % FEATURES == 0 and in_features % (COLUMNS * AHEAD) == 0 and in_features >= COLUMNS * 4


def parts_of(out_features: int, in_features: int) -> int:
    """Return the number of parts, a power of 2, into which the columns are divided."""
    steps, programs, parts = in_features // COLUMNS, out_features // FEATURES, 1
    while programs * parts * 2 <= PROGRAMS and steps % (parts * 2 * AHEAD) == 0 and steps // (parts * 2) > STAGES:
        parts *= 2
    return parts


def product(
    x: Tensor, packed: Tensor, scales: tuple[Tensor, Tensor | None, Tensor | None, Tensor | None], values: Tensor
) -> Tensor:
    """Return `x (…, in) @ Wᵀ` (…, out) in bf16.

    Args:
        x: bf16, at most ROWS rows.
        packed: W (out, in) in NF4, two columns a byte, one scale for SCALE_BLOCK of them.
        scales: `absmax, nested_code, nested_absmax, nested_offset`; the last three None without double quantization.
        values: the values of the 16 codes, fp32.
    """
    columns = x.shape[-1]
    features = packed.numel() * 2 // columns
    flat = x.reshape(-1, columns).contiguous()
    out = x.new_empty(*x.shape[:-1], features)
    parts, programs = parts_of(features, columns), features // FEATURES
    ordered, partial = x.new_empty(columns, ROWS), x.new_empty(parts, features, ROWS, dtype=torch.float32)
    ended = x.new_empty(programs, dtype=torch.int32)
    absmax, *nested = scales
    is_nested = nested[0] is not None
    code, nested_absmax, offset = nested if is_nested else (values, values, values)
    _permute[(columns // COLUMNS,)](
        flat, ordered, ended, columns, len(flat), programs, ROWS, COLUMNS, triton.next_power_of_2(programs)
    )
    _product[(programs, parts)](
        ordered, packed.reshape(-1).view(torch.int32), absmax, code, nested_absmax, offset, values, out, partial, ended,
        columns, features, len(flat), ROWS, FEATURES, parts, is_nested, STAGES, AHEAD, num_warps=WARPS,
        enable_fp_fusion=False,
    )  # fmt: skip
    return out


@triton.jit
def _permute(
    x, ordered, ended, columns, rows, programs, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ENDED: tl.constexpr
):
    """Write xᵀ (columns, ROWS) with columns j, 8 + j, 16 + j, … of each step together; rows that x lacks are zero."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.arange(0, ROWS)
    value = tl.load(x + row[:, None] * columns + column[None, :], mask=row[:, None] < rows, other=0.0)
    place = column // COLUMNS * COLUMNS + column % 8 * (COLUMNS // 8) + column % COLUMNS // 8
    tl.store(ordered + place[:, None] * ROWS + row[None, :], tl.trans(value))
    if tl.program_id(0) == 0:
        each = tl.arange(0, ENDED)
        tl.store(ended + each, tl.zeros((ENDED,), tl.int32), mask=each < programs)


@gluon.jit
def _value_of_lane(values):
    """Return the value of code `lane % 16`, which differs from lane to lane though it has no shape."""
    return gl.inline_asm_elementwise(
        "{ .reg .u32 lane; .reg .u64 at; mov.u32 lane, %laneid; and.b32 lane, lane, 15; mul.wide.u32 at, lane, 4;"
        " add.u64 at, at, $1; ld.global.nc.f32 $0, [at]; }",
        "=f,l", [values.to(gl.int64)], dtype=gl.float32, is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def _operand(lane_value, word, PLACE: gl.constexpr, scale):
    """Return the weights at a place of the words. The shuffle takes the lowest five bits; values repeat after 16."""
    shifted = word >> (PLACE ^ 1) * 4  # the first of two columns is in the high half of its byte
    value = gl.inline_asm_elementwise(
        "shfl.sync.idx.b32 $0, $1, $2, 31, -1;", "=f,f,r", [lane_value, shifted], dtype=gl.float32, is_pure=True, pack=1
    )
    return (value * scale).to(gl.bfloat16)


@gluon.jit
def _load(packed, absmax, nested_absmax, feature, word, step, first, steps, row_words, NESTED: gl.constexpr):
    """Return the words of a step (features, 16), their scales, and the scales of these; past the end the last ones."""
    at = first + gl.minimum(step, steps - 1) * 16
    words = gl.load(packed + feature.to(gl.int64)[:, None] * row_words + (at + word)[None, :])
    block = (feature * (row_words // 8))[:, None] + ((at + word) // 8)[None, :]
    scale = gl.load(absmax + block)
    if NESTED:
        outer = gl.load(nested_absmax + (block >> 8))
    else:
        outer = scale
    return words, scale, outer


@gluon.jit
def _step(
    step, words, scale, outer, sums, ring, source, lane_value, packed, absmax, nested_code, nested_absmax, offset,
    feature, word, first, steps, row_words,
    ROWS: gl.constexpr, NESTED: gl.constexpr, STAGES: gl.constexpr, AHEAD: gl.constexpr,
):  # fmt: skip
    """Add a step's products to `sums`, and load the words of the step AHEAD of it."""
    if NESTED:
        scale = gl.load(nested_code + scale.to(gl.int32)) * outer + offset
    w0 = _operand(lane_value, words, 0, scale)
    w1 = _operand(lane_value, words, 1, scale)
    w2 = _operand(lane_value, words, 2, scale)
    w3 = _operand(lane_value, words, 3, scale)
    w4 = _operand(lane_value, words, 4, scale)
    w5 = _operand(lane_value, words, 5, scale)
    w6 = _operand(lane_value, words, 6, scale)
    w7 = _operand(lane_value, words, 7, scale)
    words, scale, outer = _load(
        packed, absmax, nested_absmax, feature, word, step + AHEAD, first, steps, row_words, NESTED
    )
    sums = warpgroup_mma_init(warpgroup_mma_wait(0, deps=[sums]))  # so its place in the ring is free, too
    async_copy.wait_group(STAGES - 2)
    fence_async_shared()
    _barrier()
    later = step + STAGES - 1
    _copy(ring.index(later % STAGES), source + later * 128 * ROWS, mask=later < steps)
    async_copy.commit_group()
    tile = ring.index(step % STAGES)
    sums = warpgroup_mma(w0, tile.slice(0, 16), sums, is_async=True)
    sums = warpgroup_mma(w1, tile.slice(16, 16), sums, is_async=True)
    sums = warpgroup_mma(w2, tile.slice(32, 16), sums, is_async=True)
    sums = warpgroup_mma(w3, tile.slice(48, 16), sums, is_async=True)
    sums = warpgroup_mma(w4, tile.slice(64, 16), sums, is_async=True)
    sums = warpgroup_mma(w5, tile.slice(80, 16), sums, is_async=True)
    sums = warpgroup_mma(w6, tile.slice(96, 16), sums, is_async=True)
    sums = warpgroup_mma(w7, tile.slice(112, 16), sums, is_async=True)
    return words, scale, outer, sums


@gluon.jit
def _write(
    total, out, partial, ended, features, rows, program, part, layout: gl.constexpr, ROWS: gl.constexpr,
    FEATURES: gl.constexpr, PARTS: gl.constexpr,
):  # fmt: skip
    """Write FEATURES columns of the output; of several parts, the program that ends last adds them up."""
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(0, layout))
    at = program * FEATURES + gl.arange(0, FEATURES, layout=gl.SliceLayout(1, layout))
    target = out + row[None, :].to(gl.int64) * features + at[:, None]
    if PARTS == 1:
        gl.store(target, total.to(gl.bfloat16), mask=row[None, :] < rows)
    else:
        place = at.to(gl.int64)[:, None] * ROWS + row[None, :]
        gl.store(partial + part.to(gl.int64) * features * ROWS + place, total)
        _barrier()
        if gl.atomic_add(ended + program, 1, sem="acq_rel") == PARTS - 1:
            total = gl.zeros((FEATURES, ROWS), gl.float32, layout)
            for each in gl.static_range(PARTS):
                total += gl.load(partial + each * features.to(gl.int64) * ROWS + place, cache_modifier=".cg")
            gl.store(target, total.to(gl.bfloat16), mask=row[None, :] < rows)


@gluon.jit
def _product(
    x, packed, absmax, nested_code, nested_absmax, nested_offset, values, out, partial, ended, columns, features, rows,
    ROWS: gl.constexpr, FEATURES: gl.constexpr, PARTS: gl.constexpr, NESTED: gl.constexpr, STAGES: gl.constexpr,
    AHEAD: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """Multiply a part of the columns for FEATURES columns of the output."""
    sums_in: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[num_warps, 1], instr_shape=[16, ROWS, 16]
    )
    left: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=sums_in, k_width=2)
    copied: gl.constexpr = gl.BlockedLayout([1, 8], [256 // ROWS, ROWS // 8], [num_warps, 1], [1, 0])
    shared: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=2 * ROWS, element_bitwidth=16, rank=2)
    program, part = gl.program_id(0), gl.program_id(1)
    row_words = columns // 8
    steps, first = row_words // PARTS // 16, part * (row_words // PARTS)
    lane_value = _value_of_lane(values)
    offset = gl.load(nested_offset) if NESTED else 0.0

    ring = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 128, ROWS], shared)
    along = gl.arange(0, 128, layout=gl.SliceLayout(1, copied))
    source = x + (first * 8 + along)[:, None] * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(0, copied))[None, :]
    for stage in gl.static_range(STAGES - 1):
        _copy(ring.index(stage), source + stage * 128 * ROWS)
        async_copy.commit_group()

    feature = program * FEATURES + gl.arange(0, FEATURES, layout=gl.SliceLayout(1, left))
    word = gl.arange(0, 16, layout=gl.SliceLayout(0, left))
    sums = warpgroup_mma_init(gl.zeros((FEATURES, ROWS), gl.float32, sums_in))
    a, a_scale, a_outer = _load(packed, absmax, nested_absmax, feature, word, 0, first, steps, row_words, NESTED)
    b, b_scale, b_outer = _load(packed, absmax, nested_absmax, feature, word, 1, first, steps, row_words, NESTED)
    for step in range(0, steps, 2):
        a, a_scale, a_outer, sums = _step(
            step, a, a_scale, a_outer, sums, ring, source, lane_value, packed, absmax, nested_code, nested_absmax,
            offset, feature, word, first, steps, row_words, ROWS, NESTED, STAGES, AHEAD,
        )  # fmt: skip
        b, b_scale, b_outer, sums = _step(
            step + 1, b, b_scale, b_outer, sums, ring, source, lane_value, packed, absmax, nested_code, nested_absmax,
            offset, feature, word, first, steps, row_words, ROWS, NESTED, STAGES, AHEAD,
        )  # fmt: skip
    total = warpgroup_mma_wait(0, deps=[sums])
    _write(total, out, partial, ended, features, rows, program, part, sums_in, ROWS, FEATURES, PARTS)
