"""stored_tensors: headers of safetensors files and their floats, read without torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lorafit.errors import BackboneError

FLOATS: dict[str, np.dtype[Any]] = {"BF16": np.dtype("<u2"), "F16": np.dtype("<f2"), "F32": np.dtype("<f4")}
"""How numpy reads each stored float; bfloat16, which numpy lacks, as its bits."""
MAX_HEADER_BYTES = 100 << 20


def widened(stored: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    """Return numbers that are stored as `dtype`, a key of FLOATS, in fp32."""
    if dtype == "BF16":  # bfloat16 is the upper half of a float32
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float32)


def read_header(path: Path) -> tuple[dict[str, Mapping[str, Any]], int]:
    """Return (tensor entries by name, offset of the data) of one safetensors file.

    Raises BackboneError for a file that cannot be read, is cut off, goes on after its last tensor, or has a tensor of
    another size than its shape.
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(MAX_HEADER_BYTES, path.stat().st_size - 8):
                raise ValueError("its header is cut off")
            entries = json.loads(file.read(length))
            _check(entries, path.stat().st_size - 8 - length)
    except OSError as error:
        raise BackboneError(f"cannot be read ({error.strerror})", where=str(path), fix="check the file") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        what = "the file is truncated or not a safetensors file"
        raise BackboneError(what, where=str(path), fix="download or copy it again") from error
    return {name: entry for name, entry in entries.items() if name != "__metadata__"}, 8 + length


def _check(entries: Mapping[str, Any], data_bytes: int) -> None:
    last = 0
    for name, entry in entries.items():
        if name == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        last = max(last, end)
        width = FLOATS[entry["dtype"]].itemsize if entry["dtype"] in FLOATS else 0
        if not 0 <= begin <= end <= data_bytes or (width and int(np.prod(entry["shape"])) * width != end - begin):
            raise ValueError("a tensor lies outside the file")
    if last != data_bytes:
        raise ValueError("its data do not end with the file")
