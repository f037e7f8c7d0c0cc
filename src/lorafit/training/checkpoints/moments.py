"""moments: the optimizer's moments in a checkpoint, for any number of processes that resume from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from lorafit.errors import RunDirError
from lorafit.methods.full.sharded_folder import read_shards, tensors_in
from lorafit.methods.full.sharding import OWN, ShardLayout, is_sharded, own_shard
from lorafit.runs import ADAPTER
from lorafit.training.checkpoints.snapshot import OPTIMIZER, Resumable

SHARDED = "optimizer"
"""Folder of the moments of several processes. One process writes the file OPTIMIZER."""
MASTER = "master"
"""Name of a 16-bit weight's fp32 copy among its moments. Shards are in fp32 themselves, and have none."""


def moments_in(loop: Resumable, folder: Path) -> dict[str, Tensor]:
    """Return the moments in the checkpoint `folder` of the weights or shards of this process, as NUMBER.NAME.

    Raises RunDirError for 8-bit moments of another number of processes: their scales are those of other blocks.
    """
    layout: ShardLayout | None = loop.model.shard_layout if is_sharded(loop.model) else None  # type: ignore[assignment]
    if (folder / SHARDED).is_dir():
        return _from_shards(loop, folder, layout)
    return load_file(folder / OPTIMIZER) if layout is None else _from_whole(loop, folder, layout)


def weights_of(loop: Resumable) -> list[Tensor]:
    """Return the trained weights by their numbers."""
    return [weight for group in loop.optimizer.param_groups for weight in group["params"]]


def _from_whole(loop: Resumable, folder: Path, layout: ShardLayout) -> dict[str, Tensor]:
    """Return this process's part of the moments of whole weights; its shards take the fp32 copies."""
    weights, local = weights_of(loop), dict[str, Tensor]()
    with safe_open(folder / OPTIMIZER, framework="pt") as stored:
        for name in stored.keys():  # noqa: SIM118 (no mapping)
            number, _, rest = name.partition(".")
            weight, entry = weights[int(number)], stored.get_slice(name)
            if not entry.get_shape():
                local[name] = stored.get_tensor(name)
                continue
            if tuple(entry.get_shape()) != weight.shape or entry.get_dtype() == "U8":
                raise _belong_to(1, folder)
            own = entry[layout.rows_of(weight)]
            if rest == MASTER:
                own_shard(weight).copy_(own)
            else:
                local[name] = own
    return local


def _from_shards(loop: Resumable, folder: Path, layout: ShardLayout | None) -> dict[str, Tensor]:
    """Return this process's moments from those of shards, and its fp32 copies of whole weights."""
    weights, stored = weights_of(loop), tensors_in(folder / SHARDED)
    owners = {name.partition(".")[0] for name in stored if name.startswith(OWN)}
    if owners and len(owners) != (layout.world if layout else 1):
        raise _belong_to(len(owners), folder)
    local: dict[str, Tensor] = {}
    asked: dict[str, Tensor] = {}
    for name, (dtype, shape) in stored.items():
        if name.startswith(OWN):
            owner, _, rest = name.removeprefix(OWN).partition(".")
            if layout and int(owner) == layout.rank:
                asked[name] = local[rest] = torch.empty(shape, dtype=dtype)
            continue
        weight = weights[int(name.partition(".")[0])]
        local[name] = torch.empty(own_shard(weight).shape if shape else (), dtype=dtype)
        asked[name] = layout.on_host(local[name], weight) if layout and shape else local[name]
    read_shards(asked, folder / SHARDED)
    return local | _fp32_copies(loop, folder)


def _fp32_copies(loop: Resumable, folder: Path) -> dict[str, Tensor]:
    """Return the weights in shards as the fp32 copies of 16-bit weights; none for an optimizer without copies."""
    masters: dict[Any, Tensor] = getattr(loop.optimizer, "masters", {})
    names = {weight: name for name, weight in loop.model.named_parameters()}
    copies = {
        number: (names[weight], torch.empty(weight.shape, dtype=torch.float32))
        for number, weight in enumerate(masters)
        if masters[weight] is not weight
    }
    if copies:
        read_shards(dict(copies.values()), folder / ADAPTER)
    return {f"{number}.{MASTER}": copy for number, (_, copy) in copies.items()}


def _belong_to(processes: int, folder: Path) -> RunDirError:
    fix = f"resume with --gpus {processes}, or begin again with --restart"
    gpus = "one GPU" if processes == 1 else f"{processes} GPUs"
    return RunDirError(f"the 8-bit moments belong to {gpus}", where=str(folder), fix=fix)
