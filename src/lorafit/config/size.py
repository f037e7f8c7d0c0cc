"""Sizes as people write them: `8GiB`, `24 GB`, `512M`."""

from __future__ import annotations

import re

from lorafit.errors import UsageError

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_bytes(text: str, where: str = "size") -> int:
    """Bytes in `text`; `GiB` is 2**30 and `GB` is 10**9. Raises UsageError when it is no size."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?\s*", text.lower())
    if not match or match[2] == "i" or float(match[1]) <= 0:
        raise UsageError(f"'{text}' is not a size", where=where, fix="write it like 8GiB, 24GB or 80GiB")
    return int(float(match[1]) * _UNITS[match[2]])
