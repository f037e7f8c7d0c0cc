"""size_in_words: bytes as people read them, in the largest unit that leaves a number."""

from __future__ import annotations

import math
from collections.abc import Callable

UNITS = (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10))
TINY = 1e-6
"""Of a tenth: what truncating `6.2GiB` to whole bytes takes away is no tenth less."""


def size_in_words(size_bytes: float, rounding: Callable[[float], int] = round) -> str:
    """`5.9 GiB`, `1.0 KiB`. What is needed is rounded up (`at_least`) and what is there down (`at_most`), so that a
    sentence never sets two equal numbers against each other."""
    unit, size = next(((unit, size) for unit, size in UNITS if size_bytes >= size), ("B", 1))
    if unit == "B":
        return f"{size_bytes:.0f} B"
    return f"{rounding(10 * size_bytes / size) / 10:,.1f} {unit}"


def at_least(size_bytes: float) -> str:
    """The size in words, rounded up."""
    return size_in_words(size_bytes, lambda tenths: math.ceil(tenths - TINY))


def at_most(size_bytes: float) -> str:
    """The size in words, rounded down."""
    return size_in_words(size_bytes, lambda tenths: math.floor(tenths + TINY))
