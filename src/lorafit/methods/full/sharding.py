"""sharding: a model's weights, gradients and moments in shards, one for each process (FSDP2, torch's `fully_shard`).

Each decoder layer is gathered for its forward and its backward, in the compute dtype, as are embeddings that share no
weight with the head; all else stays gathered from the forward to the end of the backward. Gradients are summed in fp32
while they are scattered (Zhao et al., arXiv:2304.11277).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from lorafit.backbone import decoder_layers, output_head, shards_of, text_decoder

OWN = "process-"
"""Prefix of tensors that belong to one process, and to no other number of processes."""

WRITING = timedelta(minutes=30)
"""Most time that processes wait for each other while a checkpoint is written."""


def shard(model: nn.Module, device: torch.device, *, dtype: torch.dtype, wide: bool) -> nn.Module:
    """Return `model`, its weights sharded over all processes on `device`.

    The model may be on the host: one layer after another comes to `device` and leaves its shard there. With `wide` the
    shards are in fp32 and take the optimizer's updates themselves; layers compute in `dtype`, and are gathered again
    for their backward.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    narrow = wide and dtype is not torch.float32
    reduced = torch.float32 if dtype is not torch.float32 else None
    # inputs have the compute dtype already; casting would copy the row boundaries of every layer
    policy = MixedPrecisionPolicy(dtype if narrow else None, reduced, cast_forward_inputs=False)
    for part in _parts(model):
        _place(part, device, wide)
        fully_shard(part, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    _place(model, device, wide)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    for group in _groups(model):
        group.set_gradient_divide_factor(1.0)  # the loss is divided by the tokens of the whole step already
        group.set_force_sum_reduction_for_comms(True)  # gloo has no other reduction
    known = cast(Any, model)
    known.dtype_of_shards, known.shard_layout = dtype, ShardLayout()
    return model


def _parts(model: nn.Module) -> list[nn.Module]:
    """Return the modules that are gathered by themselves: the decoder layers, and untied embeddings."""
    decoder, head = text_decoder(model), output_head(model)
    layers = decoder_layers(model)
    embeddings: nn.Module = cast(Any, decoder).get_input_embeddings()
    shared = {id(weight) for weight in head.parameters()} if head is not None else set()
    is_free = isinstance(embeddings, nn.Embedding) and id(embeddings.weight) not in shared
    return [*layers, embeddings] if is_free else layers


def _place(module: nn.Module, device: torch.device, wide: bool) -> None:
    """Bring what `module` has left to `device`; its weights are widened to fp32 there if `wide`."""
    for weight in module.parameters():
        if isinstance(weight, DTensor):
            continue
        moved = weight.data.to(device)
        weight.data = moved.float() if wide else moved
    for part in module.modules():
        for name, buffer in part.named_buffers(recurse=False):
            setattr(part, name, buffer.to(device))


def _groups(model: nn.Module) -> list[FSDPModule]:
    return [part for part in model.modules() if isinstance(part, FSDPModule)]


def is_sharded(model: nn.Module) -> bool:
    """Return True if several processes hold the weights of `model` in shards."""
    return isinstance(model, FSDPModule)


def gathers_layers(model: nn.Module) -> bool:
    """Return True if the processes gather each layer together, so that all must run as many micro-batches."""
    return is_sharded(model) or shards_of(model) is not None


def free_gathered(model: nn.Module) -> None:
    """Free the gathered weights, so that only shards are left, and the next forward gathers their present values."""
    for part in _groups(model):
        part.reshard()


def is_shard(weight: Tensor) -> bool:
    """Return True if this process holds only its shard of `weight`."""
    return isinstance(weight, DTensor)


def own_shard(weight: Tensor) -> Tensor:
    """Return this process's shard of `weight`, which shares its memory; a whole weight is its own shard."""
    whole = weight.detach()
    return whole.to_local() if isinstance(whole, DTensor) else whole


def clip_shards(weights: Sequence[nn.Parameter], most: float, sum_of: Any) -> Tensor:
    """Scale the shards' gradients so that the norm over all processes is at most `most`, and return the norm ().

    `sum_of` adds a tensor over all processes. All processes get the same bits.
    """
    gradients = [own_shard(weight.grad) for weight in weights if weight.grad is not None]
    own = nn.utils.get_total_norm(gradients).float() if gradients else torch.zeros(())
    norm: Tensor = sum_of(own.square()).sqrt()
    if gradients:
        torch._foreach_mul_(gradients, (most / (norm + 1e-6)).clamp(max=1.0))
    return norm


class ShardLayout:
    """Hold the places of host copies within a sharded model. Every process makes one at the same time.

    Attributes:
        group: the processes, which talk over the host (gloo) while a checkpoint is written.
        mesh: the same processes, as torch's tensors name them.
        rank: the number of this process.
        world: the number of processes.
    """

    def __init__(self) -> None:
        self.group = dist.new_group(backend="gloo", timeout=WRITING)
        self.mesh = DeviceMesh.from_group(self.group, "cpu")
        self.rank, self.world = dist.get_rank(), dist.get_world_size()

    def on_host(self, tensor: Tensor, weight: Tensor) -> Tensor:
        """Return `tensor`, this process's part on the host of something shaped like `weight`, as part of the whole."""
        if not isinstance(weight, DTensor):
            return tensor
        whole, stride = weight.size(), weight.stride()
        return DTensor.from_local(tensor, self.mesh, [Shard(0)], run_check=False, shape=whole, stride=stride)

    def rows_of(self, weight: Tensor) -> slice:
        """Return the rows of `weight` that this process holds, as `fully_shard` deals them."""
        rows = weight.shape[0]
        each = -(-rows // self.world)
        return slice(min(self.rank * each, rows), min((self.rank + 1) * each, rows))

    def named(self, moments: Mapping[str, Tensor], weights: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return `moments`, named NUMBER.NAME by the number of their weight in `weights`, as a checkpoint keeps them.

        Moments of the shape of a shard are parts of a whole; single numbers are the same everywhere. All others, such
        as the scales of 8-bit moments, are this process's own, and their names say so.
        """
        kept: dict[str, Tensor] = {}
        for name, tensor in moments.items():
            weight = weights[int(name.partition(".")[0])]
            if tensor.ndim and tensor.shape == own_shard(weight).shape:
                kept[name] = self.on_host(tensor, weight)
            elif not tensor.ndim:
                kept[name] = tensor
            else:
                kept[f"{OWN}{self.rank}.{name}"] = tensor
        return kept
