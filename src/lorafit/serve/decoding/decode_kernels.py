"""Triton kernels of a decoding step, in which every row has one token. Import this module only if Triton is installed.

Each rounds where the family's own operations round, so that the bits are the same.
"""

from __future__ import annotations

import torch
import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]
from torch import Tensor

# mypy: disable-error-code="no-untyped-def, index"


@triton.jit
def _rotate_head(source, target, cos, sin, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Write one head of 2 * WIDTH values, rotated: x * cos + rotate_half(x) * sin."""
    place = tl.arange(0, BLOCK)
    mask = place < WIDTH
    kind = target.dtype.element_ty
    low = tl.load(source + place, mask).to(tl.float32)
    high = tl.load(source + WIDTH + place, mask).to(tl.float32)
    a = (low * tl.load(cos + place, mask).to(tl.float32)).to(kind).to(tl.float32)
    b = (-high * tl.load(sin + place, mask).to(tl.float32)).to(kind).to(tl.float32)
    c = (high * tl.load(cos + WIDTH + place, mask).to(tl.float32)).to(kind).to(tl.float32)
    d = (low * tl.load(sin + WIDTH + place, mask).to(tl.float32)).to(kind).to(tl.float32)
    tl.store(target + place, (a + b).to(kind), mask)
    tl.store(target + WIDTH + place, (c + d).to(kind), mask)


@triton.jit
def _rotate(
    query, key, cos, sin, new_query, new_key, heads, key_heads, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row, head = tl.program_id(0), tl.program_id(1)
    angle = row * 2 * WIDTH
    if head < heads:
        start = (row * heads + head) * 2 * WIDTH
        _rotate_head(query + start, new_query + start, cos + angle, sin + angle, WIDTH, BLOCK)
    else:
        start = (row * key_heads + head - heads) * 2 * WIDTH
        _rotate_head(key + start, new_key + start, cos + angle, sin + angle, WIDTH, BLOCK)


@triton.jit
def _store(keys, values, key, value, writes, heads, positions, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row, head = tl.program_id(0), tl.program_id(1)
    place = tl.arange(0, BLOCK)
    mask = place < WIDTH
    source = (row * heads + head) * WIDTH + place
    target = ((row * heads + head).to(tl.int64) * positions + tl.load(writes + row)) * WIDTH + place
    tl.store(keys + target, tl.load(key + source, mask), mask)
    tl.store(values + target, tl.load(value + source, mask), mask)


def rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Return `query` (rows, heads, 1, dim) and `key` (rows, kv heads, 1, dim), rotated by `cos`, `sin` (rows, 1, dim).

    All are contiguous.
    """
    new_query, new_key = torch.empty_like(query), torch.empty_like(key)
    rows, heads, _, dim = query.shape
    grid = (rows, heads + key.shape[1])
    width = dim // 2
    block = triton.next_power_of_2(width)
    _rotate[grid](
        query, key, cos, sin, new_query, new_key, heads, key.shape[1], width, block, num_warps=1, enable_fp_fusion=False
    )
    return new_query, new_key


def store(keys: Tensor, values: Tensor, key: Tensor, value: Tensor, writes: Tensor) -> None:
    """Write `key` and `value` (rows, kv heads, 1, dim) into `keys` and `values` (rows, kv heads, positions, dim).

    Row i goes to position `writes[i]`. All are contiguous, and alike in shape and dtype.
    """
    rows, heads, positions, dim = keys.shape
    block = triton.next_power_of_2(dim)
    _store[(rows, heads)](keys, values, key, value, writes, heads, positions, dim, block, num_warps=1)
