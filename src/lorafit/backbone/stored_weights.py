"""stored_weights: let a 4-bit model compute with its weights as stored, each read from disk when it is needed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from lorafit.backbone.architecture import is_prequantized, read_architecture, skeleton
from lorafit.backbone.base_checkpoint import Checkpoint
from lorafit.backbone.fresh_weights import Names
from lorafit.backbone.kernels.frozen_linear import FrozenLinear4bit

WRAPPED, BASE_LAYER = "base_model.model.", ".base_layer"
"""What PEFT adds to the name of a linear."""


def packed_weights(model: nn.Module) -> int:
    """Return the number of weights that `model` holds in 4 bits, of linears and of others."""
    return sum(each.dtype is torch.uint8 for each in (*model.parameters(), *model.buffers()))


@contextmanager
def with_stored_weights(model: nn.Module, folder: Path) -> Iterator[bool]:
    """Let every 4-bit linear of `model` use its weight in the base's `folder`, within the block.

    One weight is in memory at a time; adapters stay in use. Yields False, and changes nothing, where the base has no
    such weights: it is stored in 4 bits, or fuses its tensors while loading.
    """
    places = _places(folder)
    linears = {_plain(name): each for name, each in model.named_modules() if isinstance(each, FrozenLinear4bit)}
    if not linears or not set(linears) <= set(places) or packed_weights(model) != len(linears):
        yield False
        return
    for name, linear in linears.items():
        linear.forward = partial(_multiply, linear, *places[name])  # type: ignore[method-assign]
    try:
        yield True
    finally:
        for linear in linears.values():
            del linear.forward


def _plain(module: str) -> str:
    """Return the name of the module's weight in the base, whether PEFT wraps the module or not."""
    return f"{module.removeprefix(WRAPPED).removesuffix(BASE_LAYER)}.weight"


def _places(folder: Path) -> dict[str, tuple[Path, str]]:
    """Return (file, stored name) of each parameter; nothing for a base that is stored in 4 bits."""
    architecture = read_architecture(folder)
    if is_prequantized(architecture):
        return {}
    names = Names(skeleton(architecture))
    return {names.parameter(stored): (path, stored) for stored, path, _ in Checkpoint.open(folder).entries()}


def _multiply(linear: FrozenLinear4bit, path: Path, stored: str, x: Tensor) -> Tensor:
    with safe_open(path, framework="pt") as file:
        weight = file.get_tensor(stored).to(linear.weight_dtype or linear.compute_dtype)
    weight = weight.to(x.device, linear.compute_dtype)
    return F.linear(x.to(linear.compute_dtype), weight, linear.bias).to(x.dtype)
