"""write_shards: tensors into safetensors files of bounded size, with their index, one shard in memory at a time."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

MAX_SHARD_BYTES = 4 * 10**9
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class Shards:
    """What was written: the files, in order, and the bytes of all tensors."""

    files: tuple[Path, ...]
    total_bytes: int


def write_shards(tensors: Iterable[tuple[str, Tensor]], folder: Path, max_bytes: int = MAX_SHARD_BYTES) -> Shards:
    """Write `tensors` to `folder` as transformers lays them out: one file, or numbered shards and an index.

    A tensor is never split, so one that is larger than `max_bytes` has a shard to itself.
    """
    written: list[list[str]] = []
    shard: dict[str, Tensor] = {}
    size = total = 0
    for name, tensor in tensors:
        if shard and size + tensor.nbytes > max_bytes:
            written.append(_write(shard, folder, len(written)))
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
        total += tensor.nbytes
    written.append(_write(shard, folder, len(written)))
    return _name(written, folder, total)


def _unnamed(folder: Path, number: int) -> Path:
    return folder / f"shard-{number}.safetensors"


def _write(shard: dict[str, Tensor], folder: Path, number: int) -> list[str]:
    whole = {name: tensor.contiguous() for name, tensor in shard.items()}
    save_file(whole, _unnamed(folder, number), metadata={"format": "pt"})
    return list(shard)


def _name(written: list[list[str]], folder: Path, total: int) -> Shards:
    # a shard's name holds the number of shards, known only now
    count = len(written)
    names = [SINGLE] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    for number, name in enumerate(names):
        _unnamed(folder, number).rename(folder / name)
    if count > 1:
        weight_map = {tensor: name for name, tensors in zip(names, written) for tensor in tensors}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return Shards(tuple(folder / name for name in names), total)
