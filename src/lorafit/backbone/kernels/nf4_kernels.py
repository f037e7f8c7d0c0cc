"""NF4 kernels: Triton kernels that dequantize NF4 weights, nested scales included, in one launch.

Import this module only if Triton is installed. The arithmetic is bitsandbytes' own, rounded to fp32 after every step
as its kernels do (`csrc/kernels.cu`, kDequantizeBlockwise): scale = code2[absmax] * absmax2, then + offset;
weight = code * scale, then the cast. So no multiplication may be fused with an addition (`enable_fp_fusion=False`).

A thread takes 4-byte words of the packed weight, 8 values each, so that it writes 16 bytes of bf16 at a time.
"""

from __future__ import annotations

from typing import Any

import torch
import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]
from torch import Tensor

# mypy: disable-error-code="no-untyped-def, index"


NESTED_SHIFT = tl.constexpr(8)
"""Log2 of the second quantization's block size: 256 scales, fixed in bitsandbytes."""

WORDS, WARPS = 512, 4
"""4-byte words (8 weights) and warps of one program of the straight kernels."""

QUADS, COLUMNS, TRANSPOSED_WARPS = 64, 64, 4
"""Groups of four rows, columns at most, and warps of one program of the transposing kernel."""


@triton.jit
def _block_scales(absmax, nested_code, nested_absmax, nested_offset, blocks, mask, NESTED: tl.constexpr):
    """Return the fp32 scale of each of `blocks`."""
    if NESTED:
        code = tl.load(nested_code + tl.load(absmax + blocks, mask).to(tl.int32), mask)
        scale = code * tl.load(nested_absmax + (blocks >> NESTED_SHIFT), mask) + tl.load(nested_offset)
    else:
        scale = tl.load(absmax + blocks, mask)
    return scale


@triton.jit
def _unpack(
    packed, absmax, nested_code, nested_absmax, nested_offset, table, row_inverse, out, words, row_words,
    BLOCK: tl.constexpr, NESTED: tl.constexpr, ROW_SCALED: tl.constexpr, WORDS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Write dense weights in the order of the packed ones.

    With ROW_SCALED, each weight is multiplied by its row's `row_inverse`.
    """
    word = tl.program_id(0) * WORDS + tl.arange(0, WORDS)
    mask = None if WHOLE else word < words
    scale = _block_scales(absmax, nested_code, nested_absmax, nested_offset, word // (BLOCK // 8), mask, NESTED)
    if ROW_SCALED:
        scale = scale * tl.load(row_inverse + word // row_words, mask)
    eight = tl.load(packed.to(tl.pointer_type(tl.int32)) + word, mask)
    place = tl.arange(0, 8)
    # the first of two values is in the high half of its byte
    nibble = (eight[:, None] >> ((place ^ 1) * 4)[None, :]) & 15
    value = (tl.load(table + nibble) * scale[:, None]).to(out.dtype.element_ty)
    target = out + word.to(tl.int64)[:, None] * 8 + place[None, :]
    if WHOLE:
        tl.store(target, value)
    else:
        tl.store(target, value, mask[:, None])


@triton.jit
def _words_of_rows(
    packed, absmax, nested_code, nested_absmax, nested_offset, row_inverse, row, first, word, rows, row_words,
    BLOCK: tl.constexpr, NESTED: tl.constexpr,
):  # fmt: skip
    """Return the packed words numbered `first` + `word` of each `row`, and the scale of each."""
    mask = row < rows
    block = row * (row_words // (BLOCK // 8)) + first // (BLOCK // 8)
    scale = _block_scales(absmax, nested_code, nested_absmax, nested_offset, block, mask, NESTED)
    scale = scale * tl.load(row_inverse + row, mask)
    return tl.load(packed.to(tl.pointer_type(tl.int32)) + row * row_words + first + word, mask), scale


@triton.jit
def _e4m3(eight, scale, table, PLACE: tl.constexpr):
    """Return one value of each word as e4m3, in the low byte of 32 bits."""
    nibble = (eight >> ((PLACE ^ 1) * 4)) & 15
    value = (tl.load(table + nibble) * scale).to(tl.float8e4nv)
    return value.to(tl.uint8, bitcast=True).to(tl.uint32)


@triton.jit
def _unpack_transposed(
    packed, absmax, nested_code, nested_absmax, nested_offset, table, row_inverse, out, rows, row_words,
    BLOCK: tl.constexpr, NESTED: tl.constexpr, QUADS: tl.constexpr, ACROSS: tl.constexpr,
):  # fmt: skip
    """Write the values of `_unpack` with ROW_SCALED, in e4m3, as (columns, rows).

    Four rows make one 4-byte word. Tiles have 4 QUADS rows and 8 ACROSS columns, and stay flat until the store, so that
    four bytes change threads at a time.
    """
    flat = tl.arange(0, QUADS * ACROSS)
    word, row = flat % ACROSS, (tl.program_id(1) * QUADS + flat // ACROSS) * 4
    first = tl.program_id(0) * ACROSS
    a, a_scale = _words_of_rows(
        packed, absmax, nested_code, nested_absmax, nested_offset, row_inverse, row, first, word, rows, row_words,
        BLOCK, NESTED,
    )  # fmt: skip
    b, b_scale = _words_of_rows(
        packed, absmax, nested_code, nested_absmax, nested_offset, row_inverse, row + 1, first, word, rows, row_words,
        BLOCK, NESTED,
    )  # fmt: skip
    c, c_scale = _words_of_rows(
        packed, absmax, nested_code, nested_absmax, nested_offset, row_inverse, row + 2, first, word, rows, row_words,
        BLOCK, NESTED,
    )  # fmt: skip
    d, d_scale = _words_of_rows(
        packed, absmax, nested_code, nested_absmax, nested_offset, row_inverse, row + 3, first, word, rows, row_words,
        BLOCK, NESTED,
    )  # fmt: skip
    quad = tl.program_id(1) * QUADS + tl.arange(0, QUADS)
    quads = rows // 4
    start = (first + tl.arange(0, ACROSS))[None, :] * 8 * quads + quad[:, None]
    for place in tl.static_range(8):
        four = _e4m3(a, a_scale, table, place)
        four |= _e4m3(b, b_scale, table, place) << 8
        four |= _e4m3(c, c_scale, table, place) << 16
        four |= _e4m3(d, d_scale, table, place) << 24
        target = out.to(tl.pointer_type(tl.uint32)) + start + place * quads
        tl.store(target, tl.reshape(four, [QUADS, ACROSS]), (quad < quads)[:, None])


def unpack(
    packed: Tensor,
    scales: tuple[Tensor | None, ...],
    table: Tensor,
    row_inverse: Tensor | None,
    block: int,
    out: Tensor,
) -> Tensor:
    """Write the dense weight (out, in) of `packed` into `out` and return it.

    `scales` are `absmax, nested_code, nested_absmax, nested_offset`, the last three None without double quantization;
    `table` (16,) fp32 are the codes' values; `row_inverse` (out,) fp32 multiplies each row's scales.
    The number of weights is a multiple of 8.
    """
    words = out.numel() // 8
    inverse = table if row_inverse is None else row_inverse
    constants = (block, scales[1] is not None, row_inverse is not None, WORDS, words % WORDS == 0)
    tensors = (packed, *_present(scales), table, inverse, out)
    _launch(_unpack, (-(-words // WORDS), 1, 1), tensors, (words, out.shape[1] // 8), constants, WARPS)
    return out


def unpack_transposed(
    packed: Tensor, scales: tuple[Tensor | None, ...], table: Tensor, row_inverse: Tensor, block: int, out: Tensor
) -> Tensor:
    """Write the weight (out, in) of `packed`, times `row_inverse`, into `out` (in, out) in e4m3.

    Returns `out`. The output features are a multiple of 4, and the input features one of the block.
    """
    columns, rows = out.shape
    across = min(COLUMNS, block) // 8
    grid = (columns // 8 // across, -(-rows // (4 * QUADS)), 1)
    constants = (block, scales[1] is not None, QUADS, across)
    tensors = (packed, *_present(scales), table, row_inverse, out)
    _launch(_unpack_transposed, grid, tensors, (rows, columns // 8), constants, TRANSPOSED_WARPS)
    return out


_BUILT: dict[tuple[Any, ...], Any] = {}


def _launch(
    kernel: Any,
    grid: tuple[int, int, int],
    tensors: tuple[Tensor, ...],
    numbers: tuple[int, ...],
    constants: tuple[Any, ...],
    warps: int,
) -> None:
    """Run `kernel[grid](*tensors, *numbers, *constants)` on the GPU of the tensors.

    Triton's own launch spends 22 µs on finding the built kernel for such arguments, and starting that kernel takes 6
    (one core of a server CPU); a step of an 8B model launches 448 times. So the built kernel is kept, by everything
    that Triton distinguishes: dtypes, constants, numbers that are 1 or multiples of 16, pointers at multiples of 16.
    """
    pointers = 0
    for tensor in tensors:
        pointers |= tensor.data_ptr()
    key = (
        id(kernel), warps, constants, tensors[1].dtype, tensors[-1].dtype, tensors[-1].device.index,
        *((number == 1, number % 16 == 0) for number in numbers),
    )  # fmt: skip
    aligned = pointers % 16 == 0
    with torch.cuda.device_of(tensors[-1]):
        built = _BUILT.get(key) if aligned else None
        if built is not None:
            built[grid](*tensors, *numbers, *constants)
            return
        built = kernel[grid](*tensors, *numbers, *constants, num_warps=warps, enable_fp_fusion=False)
    if aligned and built is not None:  # the interpreter builds nothing
        _BUILT[key] = built


def _present(scales: tuple[Tensor | None, ...]) -> tuple[Any, ...]:
    """Return `scales` with a placeholder tensor for each None, as kernels take no None."""
    return tuple(scales[0] if scale is None else scale for scale in scales)
