"""Sizes of memory as people write them: `8GiB`, `24 GB`, `512M`."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

from lorafit.errors import UsageError

_UNITS = {"": 1} | {unit + binary: 2**power for binary in ("", "i") for unit, power in zip("kmgt", (10, 20, 30, 40))}
_MOST = 1e18
_LEAST_BARE = 2**20  # who writes 8 means GiB, not bytes


def parse_bytes(text: str, where: str = "size") -> int:
    """Return the bytes in `text`; `GB` is 2**30, as `GiB` is.

    A GPU sold with 8 GB has 8 GiB. Raises UsageError for what is no size, and for a small number without a unit.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?\s*", text.lower())
    if not match or match[2] == "i" or not 0 < float(match[1]) <= _MOST:
        raise UsageError(f"'{text[:40]}' is not a size", where=where, fix="write it like 8GiB, 24GB or 80GiB")
    size = int(float(match[1]) * _UNITS[match[2]])
    if not match[2] and size < _LEAST_BARE:
        raise UsageError(f"'{text}' has no unit", where=where, fix=f"write it like {match[1]}GiB")
    return size


UNITS = (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10))
TINY = 1e-6
"""Share of a tenth that rounding ignores: `6.2GiB` truncated to whole bytes is still 6.2."""


def size_in_words(size_bytes: float, rounding: Callable[[float], int] = round) -> str:
    """Return bytes as people read them: `5.9 GiB`, `1.0 KiB`.

    Needs are rounded up (`at_least`) and limits down (`at_most`), so that a sentence never compares equal numbers.
    """
    unit, size = next(((unit, size) for unit, size in UNITS if size_bytes >= size), ("B", 1))
    if unit == "B":
        return f"{size_bytes:.0f} B"
    return f"{rounding(10 * size_bytes / size) / 10:,.1f} {unit}"


def at_least(size_bytes: float) -> str:
    """Return the size in words, rounded up."""
    return size_in_words(size_bytes, lambda tenths: math.ceil(tenths - TINY))


def at_most(size_bytes: float) -> str:
    """Return the size in words, rounded down."""
    return size_in_words(size_bytes, lambda tenths: math.floor(tenths + TINY))
