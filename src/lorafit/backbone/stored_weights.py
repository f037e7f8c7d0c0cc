"""stored_weights: let a 4-bit model compute with its weights as stored, each read from disk when it is needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorafit.backbone.architecture import is_prequantized, read_architecture, skeleton
from lorafit.backbone.base_checkpoint import Checkpoint
from lorafit.backbone.experts import FrozenExpertsLinear, frozen_weights
from lorafit.backbone.experts.fused_tensors import Fusion
from lorafit.backbone.fresh_weights import Names
from lorafit.backbone.kernels.frozen_linear import FrozenLinear4bit

Reader = Callable[[], Tensor]
WRAPPED, BASE_LAYER = "base_model.model.", ".base_layer"
"""What PEFT adds to the name of a linear."""


def packed_weights(model: nn.Module) -> int:
    """Return the number of weights that `model` holds in 4 bits, of linears and of others."""
    return sum(each.dtype is torch.uint8 for each in (*model.parameters(), *model.buffers()))


@contextmanager
def with_stored_weights(model: nn.Module, folder: Path) -> Iterator[bool]:
    """Let every 4-bit layer of `model` use its weight in the base's `folder`, within the block.

    One weight is in memory at a time, of experts all of a layer; adapters stay in use. Yields False, and changes
    nothing, where the base has no such weights: it is stored in 4 bits, or fuses linears while loading.
    """
    readers = readers_of(folder)
    layers = {plain_name(name): each for name, each in frozen_weights(model).items()}
    if not layers or not set(layers) <= set(readers) or packed_weights(model) != len(layers):
        yield False
        return
    for name, layer in layers.items():
        if isinstance(layer, FrozenExpertsLinear):
            layer.matrices = partial(_matrices, layer, readers[name])  # type: ignore[method-assign]
        else:
            layer.forward = partial(_multiply, layer, readers[name])  # type: ignore[method-assign]
    try:
        yield True
    finally:
        for layer in layers.values():
            del layer.__dict__["matrices" if isinstance(layer, FrozenExpertsLinear) else "forward"]


def plain_name(weight: str) -> str:
    """Return the name of a weight in the base, whether PEFT wraps its module or not."""
    return weight.removeprefix(WRAPPED).replace(BASE_LAYER, "")


def readers_of(folder: Path) -> dict[str, Reader]:
    """Return a reader of each parameter; none for a base that is stored in 4 bits."""
    architecture = read_architecture(folder)
    if is_prequantized(architecture):
        return {}
    checkpoint, names = Checkpoint.open(folder), Names(skeleton(architecture))
    readers: dict[str, Reader] = {
        names.parameter(stored): partial(checkpoint.read, stored) for stored in checkpoint.names()
    }
    for fusion in names.fusions(checkpoint):
        readers |= {name: partial(_fused, checkpoint, fusion, name) for name in fusion.parameters}
    return readers


def _fused(checkpoint: Checkpoint, fusion: Fusion, name: str) -> Tensor:
    return fusion.fused({stored: checkpoint.read(stored) for stored, _ in fusion.sources})[name]


def _weight(layer: FrozenLinear4bit, read: Reader) -> Tensor:
    rounded = read().to(layer.weight_dtype or layer.compute_dtype)
    return rounded.to(layer.weight.device, layer.compute_dtype)


def _matrices(layer: FrozenExpertsLinear, read: Reader) -> Tensor:
    weight = _weight(layer, read)
    return weight.transpose(1, 2) if layer.is_transposed else weight


def _multiply(linear: FrozenLinear4bit, read: Reader, x: Tensor) -> Tensor:
    return F.linear(x.to(linear.compute_dtype), _weight(linear, read), linear.bias).to(x.dtype)
