"""RowStore: the columns that rows are read from, in memory or memory-mapped."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

NAMES = "names.json"
SUPERVISED = np.int32(np.iinfo(np.int32).min)
"""The sign bit of a stored token says 'supervised': ids and mask travel in one int32."""


def flagged(ids: NDArray[np.int32], mask: NDArray[np.bool_]) -> NDArray[np.int32]:
    """ids (tokens,) and mask (tokens,) as stored: the mask in the sign bit."""
    return np.where(mask, ids | SUPERVISED, ids).astype(np.int32)


@dataclass(frozen=True)
class RowStore:
    """Columns of n rows. Token i of row r is `tokens[offsets[r] + i]`, its sign bit the loss mask.

    `tokens` (all tokens,) int32; `offsets` (n + 1,) int64; `supervised` (n,) int32; `file` (n,) int32 into
    `names`; `line` (n,) int64; `text` (bytes,) uint8 with each record's JSON at `text_offsets` (n + 1,) int64.
    """

    tokens: NDArray[np.int32]
    offsets: NDArray[np.int64]
    supervised: NDArray[np.int32]
    file: NDArray[np.int32]
    line: NDArray[np.int64]
    names: tuple[str, ...]
    text: NDArray[np.uint8]
    text_offsets: NDArray[np.int64]
    folder: Path | None = None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @classmethod
    def open(cls, folder: Path) -> RowStore:
        """The store that StoreWriter wrote into `folder`, its tokens and text memory-mapped.

        Raises OSError, KeyError or ValueError when a file is missing or damaged.
        """
        column = {
            name: np.load(folder / f"{name}.npy") for name in ("length", "supervised", "file", "line", "text_length")
        }
        store = cls(
            tokens=mapped(folder / "tokens.bin", np.int32),
            offsets=offsets_of(column["length"]),
            supervised=column["supervised"],
            file=column["file"],
            line=column["line"],
            names=tuple(json.loads((folder / NAMES).read_text(encoding="utf-8"))),
            text=mapped(folder / "text.bin", np.uint8),
            text_offsets=offsets_of(column["text_length"]),
            folder=folder,
        )
        if len(store.tokens) != store.offsets[-1] or len(store.text) != store.text_offsets[-1]:
            raise ValueError(f"the store in {folder} is damaged")
        return store

    def __reduce__(self) -> tuple[Any, ...]:
        # to another process a store on disk travels as its path: pickle would copy what is memory-mapped
        if self.folder is not None:
            return RowStore.open, (self.folder,)
        return RowStore, tuple(getattr(self, field.name) for field in fields(self))


def offsets_of(lengths: Sequence[int] | NDArray[np.integer[Any]]) -> NDArray[np.int64]:
    """(n + 1,) starts of rows of these lengths, and the end."""
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(np.asarray(lengths, dtype=np.int64), out=offsets[1:])
    return offsets


def mapped(path: Path, kind: type[np.generic]) -> NDArray[Any]:
    """The values of `kind` in the file at `path`, memory-mapped."""
    return np.memmap(path, kind, mode="r") if path.stat().st_size else np.zeros(0, kind)
