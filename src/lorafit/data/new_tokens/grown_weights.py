"""grown_weights: a base's safetensors with rows for new tokens, written without torch.

Each new row is the mean of the rows before it, as transformers' `mean_resizing` has it but for its noise of 1e-9.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from lorafit.config import read_json
from lorafit.config.stored_tensors import FLOATS, MAX_HEADER_BYTES, read_header, widened
from lorafit.errors import BackboneError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
IN_A_LAYER = re.compile(r"(^|\.)(layers|h|blocks|block)\.\d+\.")
BLOCK_BYTES = 1 << 24
MOST_ALIGNED = 64


@dataclass(frozen=True)
class Growth:
    """Hold what happens to a vocabulary's tensors.

    Attributes:
        rows: rows of the base's embedding.
        ids: ids of the new tokens, ascending.
    """

    rows: int
    ids: tuple[int, ...]

    @property
    def grown(self) -> int:
        """Return the rows afterwards: as many as needed, divisible by the power of two that the base's rows are."""
        aligned = min(self.rows & -self.rows, MOST_ALIGNED)
        return max(self.rows, -(-(self.ids[-1] + 1) // aligned) * aligned)


def vocabulary_of(config: Mapping[str, Any]) -> int:
    """Return the rows of the embedding by config.json. Raises BackboneError where it does not name one vocabulary."""
    parts = [part for part in (config, config.get("text_config")) if isinstance(part, dict)]
    sizes = {part["vocab_size"] for part in parts if "vocab_size" in part}
    if len(sizes) != 1 or not isinstance(size := sizes.pop(), int) or size < 1:
        raise _no_growth("its config.json does not name one vocabulary")
    if any("vocab_size_per_layer_input" in part for part in parts):
        raise _no_growth("each of its layers has a vocabulary of its own")
    return size


def grown_config(config: dict[str, Any], growth: Growth) -> dict[str, Any]:
    """Return config.json for the grown vocabulary."""
    changed = {key: growth.grown if key == "vocab_size" else value for key, value in config.items()}
    text = config.get("text_config")
    return {**changed, "text_config": grown_config(text, growth)} if isinstance(text, dict) else changed


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors of the base in `folder`; one file goes before an index, as in transformers."""
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    named = read_json(folder / INDEX, BackboneError, max_bytes=MAX_HEADER_BYTES).get("weight_map")
    return [folder / name for name in sorted(set(named.values()))] if isinstance(named, dict) else []


def write_grown(origin: Path, place: Path, growth: Growth) -> list[Path]:
    """Write the weights of the base `origin` to the folder `place`, grown. Return the files that differ.

    A file without rows of the vocabulary is linked. Raises BackboneError for rows that cannot grow, OSError.
    """
    files = weight_files(origin)
    headers = {path: _in_order(read_header(path)) for path in files}
    vocabulary = {path: _of_vocabulary(header, growth) for path, (header, _) in headers.items()}
    if not any(vocabulary.values()):
        raise _no_growth(f"no tensor of it has the {growth.rows:,} rows of its vocabulary")
    written = []
    for path in files:
        if vocabulary[path]:
            _rewrite(path, place / path.name, headers[path], vocabulary[path], growth)
            written.append(place / path.name)
        else:
            _link(path, place / path.name)
    if (origin / INDEX).is_file() and files[0].name != SINGLE:
        index = read_json(origin / INDEX, BackboneError, max_bytes=MAX_HEADER_BYTES)
        index.pop("metadata", None)  # its total size is another
        (place / INDEX).write_text(json.dumps({"metadata": {}, **index}, indent=2) + "\n", encoding="utf-8")
    return written


def _no_growth(reason: str) -> BackboneError:
    return BackboneError(f"the base takes no new tokens: {reason}", where="new_tokens", fix="leave new_tokens out")


Header = tuple[dict[str, Any], int]
"""Entries of a safetensors file in the order of their data, and the offset of the data."""


def _in_order(header: tuple[Mapping[str, Any], int]) -> Header:
    entries, start = header
    return dict(sorted(entries.items(), key=lambda entry: entry[1]["data_offsets"])), start


def _of_vocabulary(header: Mapping[str, Any], growth: Growth) -> set[str]:
    """Return the tensors with a row for each token: embedding, head, and the head's bias."""
    found = {
        name
        for name, entry in header.items()
        if entry["shape"][:1] == [growth.rows] and len(entry["shape"]) <= 2 and not IN_A_LAYER.search(name)
    }
    for name in found:
        if header[name]["dtype"] not in FLOATS:
            raise _no_growth(f"its {name} is stored in {header[name]['dtype']}, not in 16 or 32 bits")
    return found


def _link(source: Path, place: Path) -> None:
    source = source.resolve()
    place.unlink(missing_ok=True)
    with suppress(OSError):
        os.link(source, place)
        return
    place.symlink_to(source)  # another disk


def _rewrite(source: Path, place: Path, header: Header, vocabulary: set[str], growth: Growth) -> None:
    entries, start = header
    grown, offset = {}, 0
    for name, entry in entries.items():
        begin, end = entry["data_offsets"]
        size, shape = end - begin, list(entry["shape"])
        if name in vocabulary:
            size, shape = size // growth.rows * growth.grown, [growth.grown, *shape[1:]]
        grown[name] = {"dtype": entry["dtype"], "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps({"__metadata__": {"format": "pt"}, **grown}).encode()
    text += b" " * (-len(text) % 8)
    staged = place.with_name(f".{place.name}.{os.getpid()}.partial")
    try:
        with source.open("rb") as old, staged.open("wb") as new:
            new.write(len(text).to_bytes(8, "little") + text)
            for name, entry in entries.items():
                old.seek(start + entry["data_offsets"][0])
                size = entry["data_offsets"][1] - entry["data_offsets"][0]
                if name in vocabulary:
                    _grow(old, new, size, entry["dtype"], growth)
                else:
                    _copy(old, new, size)
            new.flush()
            os.fsync(new.fileno())
        staged.replace(place)
    finally:
        staged.unlink(missing_ok=True)


def _copy(old: IO[bytes], new: IO[bytes], size: int) -> None:
    while size:
        block = old.read(min(size, BLOCK_BYTES))
        if not block:
            raise OSError("the file ends within a tensor")
        new.write(block)
        size -= len(block)


def _grow(old: IO[bytes], new: IO[bytes], size: int, dtype: str, growth: Growth) -> None:
    """Copy a tensor of `size` bytes, with the mean of the rows before the first new token in the new ones."""
    kind = FLOATS[dtype]
    width = size // kind.itemsize // growth.rows
    total, first, place = np.zeros(width), growth.ids[0], new.tell()
    for begin, rows in _blocks(old, kind, width, growth.rows):
        new.write(rows.tobytes())
        known = rows[: max(0, first - begin)]
        total += widened(known, dtype).sum(axis=0, dtype=np.float64)
    mean = _narrow(total / min(first, growth.rows), dtype).tobytes()
    new.write(mean * (growth.grown - growth.rows))
    end = new.tell()
    for row in growth.ids:  # rows that the base had to spare
        new.seek(place + row * width * kind.itemsize)
        new.write(mean)
    new.seek(end)


def _blocks(old: IO[bytes], kind: np.dtype[Any], width: int, rows: int) -> Iterator[tuple[int, NDArray[Any]]]:
    """Yield (first row, rows (n, width)) of a stored tensor."""
    at_once = max(1, BLOCK_BYTES // max(1, width * kind.itemsize))
    for begin in range(0, rows, at_once):
        count = min(at_once, rows - begin)
        raw = old.read(count * width * kind.itemsize)
        yield begin, np.frombuffer(raw, kind).reshape(count, width)


def _narrow(mean: NDArray[np.float64], dtype: str) -> NDArray[Any]:
    """Return `mean` in the tensor's dtype, rounded to the nearest even value."""
    if dtype != "BF16":
        return mean.astype(FLOATS[dtype])
    bits = mean.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(FLOATS[dtype])
