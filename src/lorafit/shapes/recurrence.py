"""Recurrence: the memory of a module that carries a state along the sequence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

CHUNKS = (2, 4, 8)
"""Chunks of the rows whose bytes are counted. The bytes of a row are a polynomial of degree 2 in its chunks."""


@dataclass(frozen=True, slots=True)
class Recurrence:
    """Hold the bytes that one kind of recurrent module takes in transformers' own PyTorch code, without its linears.

    Attributes:
        count: Modules of this kind in the model.
        chunk: Tokens that the code pads a row to multiples of.
        kept: Bytes kept for the backward pass of a row of each of CHUNKS, by the width of the compute dtype in bytes.
        peaks: Most bytes alive in both passes of such a row, in the same way.
    """

    count: int
    chunk: int
    kept: Mapping[int, Sequence[int]]
    peaks: Mapping[int, Sequence[int]]

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> Recurrence:
        """Return the recurrence that the skeleton's child process wrote as JSON."""
        kept, peaks = ({int(width): tuple(sizes) for width, sizes in found[key].items()} for key in ("kept", "peaks"))
        return cls(found["count"], found["chunk"], kept, peaks)

    def kept_bytes(self, rows: float, length: int, width: int) -> int:
        """Return the bytes kept for the backward pass of `rows` rows of `length` tokens."""
        return round(rows * _at(self._chunks(length), self.kept[width]))

    def working_bytes(self, rows: float, length: int, width: int) -> int:
        """Return the most bytes that both passes need beside the kept ones."""
        peak = round(rows * _at(self._chunks(length), self.peaks[width]))
        return max(0, peak - self.kept_bytes(rows, length, width))

    def _chunks(self, length: int) -> int:
        return -(-length // self.chunk)


def _at(place: int, values: Sequence[int]) -> float:
    """Return the value at `place` of the polynomial with `values` at CHUNKS."""
    total = 0.0
    for own, value in zip(CHUNKS, values, strict=True):
        term = float(value)
        for other in CHUNKS:
            if other != own:
                term *= (place - other) / (own - other)
        total += term
    return total
