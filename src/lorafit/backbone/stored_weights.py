"""stored_weights: let a 4-bit model compute with its weights as stored, each read from disk when it is needed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from lorafit.backbone.architecture import is_prequantized, read_architecture, skeleton
from lorafit.backbone.base_checkpoint import Checkpoint
from lorafit.backbone.fresh_weights import Names
from lorafit.backbone.kernels.frozen_linear import FrozenLinear4bit


@contextmanager
def with_stored_weights(model: nn.Module, folder: Path) -> Iterator[bool]:
    """Let every 4-bit linear of `model` use its weight in the base's `folder`, within the block.

    One weight is in memory at a time. Yields False, and changes nothing, where the base has no such weights: it is
    stored in 4 bits, or fuses its tensors while loading.
    """
    places = _places(folder)
    linears = {f"{name}.weight": each for name, each in model.named_modules() if isinstance(each, FrozenLinear4bit)}
    if not linears or not set(linears) <= set(places):
        yield False
        return
    for name, linear in linears.items():
        linear.forward = partial(_multiply, linear, *places[name])  # type: ignore[method-assign]
    try:
        yield True
    finally:
        for linear in linears.values():
            del linear.forward


def _places(folder: Path) -> dict[str, tuple[Path, str]]:
    """Return (file, stored name) of each parameter; nothing for a base that is stored in 4 bits."""
    architecture = read_architecture(folder)
    if is_prequantized(architecture):
        return {}
    names = Names(skeleton(architecture))
    return {names.parameter(stored): (path, stored) for stored, path, _ in Checkpoint.open(folder).entries()}


def _multiply(linear: FrozenLinear4bit, path: Path, stored: str, x: Tensor) -> Tensor:
    with safe_open(path, framework="pt") as file:
        weight = file.get_tensor(stored).to(x.device, linear.compute_dtype)
    return F.linear(x.to(linear.compute_dtype), weight, linear.bias).to(x.dtype)
