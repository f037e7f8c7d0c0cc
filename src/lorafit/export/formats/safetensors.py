"""Safetensors: 16-bit weights in files of bounded size with an index, for transformers and vLLM."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lorafit.backbone import load_whole, rounding_activations
from lorafit.export.formats.export_format import OpenedModel, TransformersModel, Written

MAX_SHARD_BYTES = 4 * 10**9
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class Safetensors:
    """Write and open the format of transformers and vLLM. It implements `ExportFormat`.

    Attributes:
        dtype: the precision of the weights.
        max_shard_bytes: most bytes of a file, unless a single tensor is larger.
        keeps_dtype: True if each tensor comes and stays in the dtype of its base.
    """

    dtype: torch.dtype = torch.bfloat16
    max_shard_bytes: int = MAX_SHARD_BYTES
    keeps_dtype: bool = False
    name = "safetensors"
    library_name = "transformers"
    lossy = False

    @property
    def bytes_per_weight(self) -> float:
        """Return the bytes on disk of each weight."""
        return self.dtype.itemsize

    def write(self, weights: Iterable[tuple[str, Tensor]], folder: Path) -> Written:
        """Write `weights` to `folder` as one file, or as numbered shards with an index.

        One shard is in memory at a time. A tensor is never split: a tensor over `max_shard_bytes` has its own shard.
        """
        written: list[list[str]] = []
        shard: dict[str, Tensor] = {}
        size = total = 0
        for name, tensor in weights:
            rounds = tensor.is_floating_point() and not self.keeps_dtype
            stored = tensor.to(self.dtype) if rounds else tensor
            if shard and size + stored.nbytes > self.max_shard_bytes:
                written.append(_write(shard, folder, len(written)))
                shard, size = {}, 0
            shard[name] = stored
            size += stored.nbytes
            total += stored.nbytes
        written.append(_write(shard, folder, len(written)))
        return _name(written, folder, total)

    @contextmanager
    def open(self, folder: Path, device: torch.device, compute: torch.dtype) -> Iterator[OpenedModel]:
        """Load the model in `folder` with transformers, in the precision of its weights.

        If the live model computes in another precision, the model runs in fp32 with weights and activations rounded to
        its own precision, since many CPUs are slow in real bf16.
        """
        if compute is self.dtype:
            yield TransformersModel(_load(folder, self.dtype, device))
        else:
            with rounding_activations(_load(folder, torch.float32, device), self.dtype) as model:
                yield TransformersModel(model)


def _load(folder: Path, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """Load the model as its users do.

    On CUDA, layers that do not fit beside the live model stay on the host.
    """
    placement = "auto" if device.type == "cuda" else {"": device}
    return load_whole(folder, dtype=dtype, device_map=placement).eval()


def _unnamed(folder: Path, number: int) -> Path:
    return folder / f"shard-{number}.safetensors"


def _write(shard: dict[str, Tensor], folder: Path, number: int) -> list[str]:
    whole = {name: tensor.contiguous() for name, tensor in shard.items()}
    save_file(whole, _unnamed(folder, number), metadata={"format": "pt"})
    return list(shard)


def _name(written: list[list[str]], folder: Path, total: int) -> Written:
    # a shard's name contains the number of shards, which is known only now
    count = len(written)
    names = [SINGLE] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    for number, name in enumerate(names):
        _unnamed(folder, number).rename(folder / name)
    if count > 1:
        weight_map = {tensor: name for name, tensors in zip(names, written) for tensor in tensors}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return Written(tuple(folder / name for name in names), total)
