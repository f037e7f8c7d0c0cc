"""layer_shards: the frozen weights of decoder layers, a share in each process, gathered one layer ahead.

Each process holds 1/N of the bytes of every layer. All layers read their weights from two buffers in turn: while one
layer runs, the next is gathered into the other buffer. Weights are frozen, so nothing is reduced. Bytes are bytes:
packed NF4, its scales and 16-bit weights travel alike, and none of them is converted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch import distributed as dist

from lorafit.backbone.architecture import decoder_layers, unwrapped
from lorafit.backbone.bitsandbytes_import import Params4bit
from lorafit.backbone.kernels.frozen_linear import refresh_linears
from lorafit.errors import BackboneError, TrainingError

ALIGNMENT = 256
"""Bytes to which the place of each tensor in a layer is rounded up, for kernels that read 16 bytes at a time."""
BUFFERS = 2
_ALL_GATHER: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # renamed in torch 2.13
WORDS = 1 << 23
"""Words of 8 bytes that are summed at a time."""
PLACE = 0x9E3779B97F4A7C15 - 2**64
"""Odd factor that spreads the places of words over 64 bits, as a signed number."""
FACTORS = 0xFF51AFD7ED558CCD - 2**64, 0xC4CEB9FE1A85EC53 - 2**64
"""Factors of MurmurHash3's 64-bit finalizer, as signed numbers."""


class _Place(NamedTuple):
    """Hold where a tensor of a layer is kept.

    Attributes:
        owner: the parameter, or the quantization state, that refers to it.
        name: the attribute of a quantization state; empty for a parameter.
        like: an empty tensor of its dtype and shape, on no device.
        start: the offset of its first byte in the layer.
    """

    owner: Any
    name: str
    like: Tensor
    start: int

    @property
    def end(self) -> int:
        """Return the offset after its last byte."""
        return self.start + self.like.numel() * self.like.element_size()

    def put(self, buffer: Tensor) -> None:
        """Let the owner read from `buffer`, the bytes of the layer; its values are whatever is there at the time."""
        # `data` has a version counter of its own, so that autograd allows the next layer to overwrite it
        view = buffer[self.start : self.end].view(self.like.dtype).view(self.like.shape).data
        if self.name:
            setattr(self.owner, self.name, view)
        else:
            with torch._C.DisableTorchFunctionSubclass():
                self.owner.data = view


class LayerShards:
    """Hold this process's share of every decoder layer's frozen weights, and two buffers for gathered layers.

    `take` every layer in order, then `install`. Every process calls the same in the same order.

    Attributes:
        shards: this process's bytes of each layer.
        rank: the number of this process.
        world: the number of processes.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.rank, self.world = device, dist.get_rank(), dist.get_world_size()
        self.shards: list[Tensor] = []
        self._layers: list[nn.Module] = []
        self._places: list[list[_Place]] = []
        self._buffers: list[Tensor] = []
        self._held: list[int | None] = [None] * BUFFERS
        self._arrivals: list[Any] = [None] * BUFFERS
        self._digests: list[int] = []

    def take(self, layer: nn.Module) -> None:
        """Keep this process's share of the frozen weights of `layer`, and free the rest."""
        tensors = list(_frozen_tensors(layer))
        places: list[_Place] = []
        start = 0
        for owner, name, tensor in tensors:
            places.append(_Place(owner, name, torch.empty_like(tensor, device="meta"), start))
            start = _rounded_up(places[-1].end, ALIGNMENT)
        share = _rounded_up(-(-start // self.world), ALIGNMENT)
        own = torch.zeros(share, dtype=torch.uint8, device=self.device)
        for place, (_, _, tensor) in zip(places, tensors, strict=True):
            _copy_overlap(own, self.rank * share, place.start, _bytes_of(tensor).to(self.device))
        with torch.no_grad():
            for place in places:
                _forget(place, self.device)
            for module in layer.modules():
                for name, buffer in module.named_buffers(recurse=False):
                    setattr(module, name, buffer.to(self.device))
        self.shards.append(own)
        self._layers.append(layer)
        self._places.append(places)

    def install(self, model: nn.Module) -> None:
        """Let all layers of `model` read from the buffers, and gather them when they run."""
        largest = max(len(shard) for shard in self.shards) * self.world
        self._buffers = [torch.zeros(largest, dtype=torch.uint8, device=self.device) for _ in range(BUFFERS)]
        with torch.no_grad():
            for index, places in enumerate(self._places):
                for place in places:
                    place.put(self._buffers[index % BUFFERS])
        for index, layer in enumerate(self._layers):
            refresh_linears(layer)
            cast(Any, layer).shard_index = index
            layer.register_forward_pre_hook(lambda layer, given: self.before(layer))
            layer.register_forward_hook(lambda layer, given, out: self.after(layer, out))
        self._digests = [_digest(shard) for shard in self.shards]
        cast(Any, model).layer_shards = self

    def before(self, layer: Any) -> None:
        """Have the weights of `layer` at hand for its forward pass, and begin to gather those of the next one."""
        self._have(layer.shard_index, layer.shard_index + 1)

    def after(self, layer: Any, out: Any) -> None:
        """Have the weights of `layer` at hand again when the gradient of its output `out` arrives."""
        hidden = out[0] if isinstance(out, tuple) else out
        if hidden.requires_grad:
            index = layer.shard_index
            hidden.register_hook(lambda gradient: self._have(index, index - 1))

    def require_unchanged(self) -> None:
        """Raise TrainingError unless every byte of this process is the one that was loaded."""
        for index, (shard, known) in enumerate(zip(self.shards, self._digests, strict=True)):
            if _digest(shard) != known:
                raise TrainingError(
                    f"the frozen weights of layer {index} have changed in process {self.rank}",
                    fix="test the GPU's memory, then run the same command again",
                )

    def _have(self, index: int, following: int) -> None:
        place = index % BUFFERS
        if self._held[place] != index:
            self._gather(index)
        if self._arrivals[place] is not None:
            self._arrivals[place].wait()
            self._arrivals[place] = None
        if 0 <= following < len(self.shards) and self._held[following % BUFFERS] != following:
            self._gather(following)

    def _gather(self, index: int) -> None:
        """Begin to gather layer `index`. The transfer waits for what this process has enqueued so far."""
        place, shard = index % BUFFERS, self.shards[index]
        if self._arrivals[place] is not None:
            self._arrivals[place].wait()
        whole = self._buffers[place][: len(shard) * self.world]
        self._arrivals[place] = _ALL_GATHER(whole, shard, async_op=True)
        self._held[place] = index


def shards_of(model: Any) -> LayerShards | None:
    """Return the shards that the frozen layers of `model` are gathered from; None for a base that is whole."""
    found: LayerShards | None = getattr(unwrapped(model), "layer_shards", None)
    return found


def require_unchanged(model: nn.Module) -> None:
    """Raise TrainingError if a frozen weight that several processes share is no longer the one that was loaded."""
    if (shards := shards_of(model)) is not None:
        shards.require_unchanged()


def shard_layers(model: nn.Module, device: torch.device) -> nn.Module:
    """Return the frozen `model`, whose decoder layers are sharded over all processes; all else is on `device`."""
    shards = LayerShards(device)
    for layer in decoder_layers(model):
        shards.take(layer)
    return install_shards(model, shards)


def install_shards(model: nn.Module, shards: LayerShards) -> nn.Module:
    """Return `model` with everything outside the layers that `shards` has taken on its device."""
    taken = {id(part) for layer in decoder_layers(model) for part in layer.modules()}
    for module in model.modules():
        if id(module) not in taken:
            for weight in module.parameters(recurse=False):
                weight.data = weight.data.to(shards.device)
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(shards.device))
    shards.install(model)
    return model


def _frozen_tensors(layer: nn.Module) -> Sequence[tuple[Any, str, Tensor]]:
    """Return owner, attribute and value of every large tensor of `layer`: its weights, and the scales of packed ones.

    Raises BackboneError for buffers, in which experts are packed.
    """
    found: list[tuple[Any, str, Tensor]] = []
    if any(buffer.dtype is torch.uint8 for buffer in layer.buffers()):
        raise BackboneError("a base with packed experts is not sharded over GPUs", fix="use a GPU that holds the base")
    for weight in layer.parameters():
        if weight.requires_grad:
            continue
        with torch._C.DisableTorchFunctionSubclass():
            plain = weight.data.as_subclass(Tensor)
        found.append((weight, "", plain))
        if isinstance(weight, Params4bit):
            state = weight.quant_state
            found.append((state, "absmax", state.absmax))
            if state.nested:
                found.append((state.state2, "absmax", state.state2.absmax))
    return found


def _forget(place: _Place, device: torch.device) -> None:
    """Free the tensor at `place`; scales that stay, such as code tables, come to `device`."""
    none = torch.empty(0, dtype=place.like.dtype, device=device)
    if not place.name:
        with torch._C.DisableTorchFunctionSubclass():
            place.owner.data = none
        return
    setattr(place.owner, place.name, none)
    for name in ("code", "offset"):
        if isinstance(value := getattr(place.owner, name, None), Tensor):
            setattr(place.owner, name, value.to(device))


def _bytes_of(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def _copy_overlap(own: Tensor, own_start: int, start: int, tensor: Tensor) -> None:
    """Copy those bytes of `tensor`, at `start` in its layer, that lie in `own`, at `own_start`."""
    first, last = max(own_start, start), min(own_start + len(own), start + len(tensor))
    if first < last:
        own[first - own_start : last - own_start] = tensor[first - start : last - start]


def _rounded_up(size: int, unit: int) -> int:
    return -(-size // unit) * unit


def _digest(shard: Tensor) -> int:
    """Return the sum, modulo 2**64, of the words of `shard`, each mixed with its place (MurmurHash3's finalizer).

    Mixing is one-to-one, so that no single changed word escapes; two or more do in one of 2**64 cases.
    """
    total = 0
    for number, words in enumerate(shard.view(torch.int64).split(WORDS)):
        places = torch.arange(number * WORDS, number * WORDS + len(words), device=shard.device)
        mixed = words ^ places.mul_(PLACE)
        for factor in FACTORS:
            mixed = _folded(mixed).mul_(factor)
        total += int(_folded(mixed).sum())
    return total % 2**64


def _folded(words: Tensor) -> Tensor:
    """Return `words`, the lower half of each XORed with its upper half."""
    return words ^ (words >> 32).bitwise_and_(0xFFFFFFFF)
