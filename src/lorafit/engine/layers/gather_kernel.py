"""One Triton kernel that reads chosen rows of a table in pinned host memory, over the link, without the host's help."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

triton: Any
tl: Any
try:
    import triton  # type: ignore[import-not-found, import-untyped, unused-ignore, no-redef]
    import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore, no-redef]

    HAS_TRITON = True
except ImportError:  # CPU builds of torch come without it
    HAS_TRITON = False

BLOCK = 1024


def gathered(table: Tensor, ids: Tensor) -> Tensor:
    """`table[ids]` on the device of `ids`: table (entries, width), pinned; ids (...) int64; returns (..., width).

    An id outside the table gives NaN, as reading there would be reading the host's other memory.
    """
    entries, width = table.shape
    assert table.is_contiguous() and ids.is_contiguous(), "rows must lie one after another"
    out = torch.empty((*ids.shape, width), dtype=table.dtype, device=ids.device)
    if ids.numel():
        with torch.cuda.device_of(ids):
            _gather[(ids.numel(), triton.cdiv(width, BLOCK))](table, ids, out, entries, WIDTH=width, BLOCK=BLOCK)
    return out


if HAS_TRITON:

    @triton.jit
    def _gather(table, ids, out, entries, WIDTH: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        token = tl.program_id(0).to(tl.int64)
        columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        entry = tl.load(ids + token)
        inside = (entry >= 0) & (entry < entries)
        row = tl.load(table + entry * WIDTH + columns, mask=inside & (columns < WIDTH), other=float("nan"))
        tl.store(out + token * WIDTH + columns, row, mask=columns < WIDTH)
