"""sharded_folder: the shards of all processes on disk, as safetensors without pickle (torch.distributed.checkpoint).

Every process writes its own file, and each file knows the places of its parts. Any number of processes, or one, reads
what it needs.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from lorafit.errors import AdapterError
from lorafit.methods.full.sharding import ShardLayout, free_gathered, is_sharded, own_shard
from lorafit.methods.saving import require_finite
from lorafit.runs import SHARDS

LOGGERS = ("torch.distributed.checkpoint", "torch.distributed.checkpoint.hf_storage")


def processes_of(folder: Path) -> int:
    """Return the number of processes that have written `folder`: 1 for a Hugging Face model."""
    return max(1, len(list(folder.glob(SHARDS))))


def write_shards(tensors: Mapping[str, Tensor], folder: Path, group: Any) -> None:
    """Write `tensors` of all processes of `group` to `folder`. Every process calls this at the same time.

    Raises torch's CheckpointException in all processes if one cannot write.
    """
    _be_quiet()
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    save(dict(tensors), storage_writer=writer, process_group=group)


def read_shards(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Fill `tensors` from `folder`, however many processes have written it."""
    _be_quiet()
    load(dict(tensors), storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)


def tensors_in(folder: Path) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Return name -> dtype and whole shape of every tensor in `folder`."""
    found: Any = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return {name: (entry.properties.dtype, tuple(entry.size)) for name, entry in sorted(found.items())}


def _be_quiet() -> None:
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)


@dataclass(frozen=True)
class ShardsSnapshot:
    """Hold this process's shards of all weights of one moment, on the host. It implements `MethodSnapshot`.

    Attributes:
        tensors: the shards by the model's own names, as parts of the whole weights.
        layout: the processes that hold the other parts.
    """

    tensors: Mapping[str, Tensor]
    layout: ShardLayout

    @classmethod
    def of(cls, model: Any) -> ShardsSnapshot:
        """Copy the shards of `model`. Training may continue while the copy is written."""
        layout: ShardLayout = model.shard_layout
        held = _held(model)
        copies = {name: own_shard(tensor).to("cpu", copy=True) for name, tensor in held.items()}
        return cls({name: layout.on_host(copy, held[name]) for name, copy in copies.items()}, layout)

    @property
    def size_bytes(self) -> int:
        """Return the bytes of all tensors, of every process."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())

    def require_finite(self, where: Path) -> None:
        """Raise AdapterError if a weight of this process is NaN or infinite. Such a model is never saved."""
        own = {name: own_shard(tensor) for name, tensor in self.tensors.items()}
        require_finite(own, where, "the model is not saved")

    def write(self, folder: Path) -> None:
        """Write this process's file; every process calls this at the same time."""
        write_shards(self.tensors, folder, self.layout.group)


def restore_shards(model: Any, folder: Path) -> None:
    """Copy the weights in shards in `folder` into `model`, sharded or whole. Raises AdapterError if they do not fit."""
    free_gathered(model)
    held, stored = _held(model), tensors_in(folder)
    _require_fit(set(held), set(stored), folder)
    copies = {name: torch.empty(own_shard(one).shape, dtype=stored[name][0]) for name, one in held.items()}
    layout: ShardLayout | None = model.shard_layout if is_sharded(model) else None
    parts = {name: layout.on_host(copy, held[name]) for name, copy in copies.items()} if layout else copies
    read_shards(parts, folder)
    for name, copy in copies.items():
        own_shard(held[name]).copy_(copy)


def take_shards(model: Any, whole: nn.Module, folder: Path) -> None:
    """Copy this process's shards of the model `whole` into `model`. Raises AdapterError if they do not fit."""
    free_gathered(model)
    held, stored = dict(model.named_parameters()), dict(whole.named_parameters())
    _require_fit(set(held), set(stored), folder)
    for name, tensor in held.items():
        own_shard(tensor).copy_(stored[name].detach()[model.shard_layout.rows_of(tensor)])


def _require_fit(held: set[str], stored: set[str], folder: Path) -> None:
    if odd := sorted(held ^ stored):
        raise AdapterError(f"the weights do not fit this run: {odd[0]} is in only one of them", where=str(folder))


def _held(model: nn.Module) -> dict[str, Tensor]:
    """Return name -> weight or kept buffer of a model whose layers are not gathered."""
    stored = model.state_dict(keep_vars=True)  # without the buffers that are computed
    return {**dict(model.named_parameters()), **{name: one for name, one in model.named_buffers() if name in stored}}
