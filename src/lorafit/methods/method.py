"""Method: the door for ways to train a base. LoRA is one; full fine-tuning is the next."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from lorafit.config import RunConfig


class MethodSnapshot(Protocol):
    """Trained weights at one moment, copied to the host, so that training goes on while they are written."""

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors."""
        ...

    def require_finite(self, where: Path) -> None:
        """Raise AdapterError when a weight is NaN or infinite; `where` goes into the message."""
        ...

    def write(self, folder: Path) -> None:
        """Write the weights into `folder`, which exists and is empty."""
        ...


class Method(Protocol):
    """What the training loop, checkpoints, chat, merge and the plan ask of a method. It holds no state of a run."""

    name: str
    """The value of the setting that chooses this method."""

    def prepare(self, model: nn.Module, config: RunConfig, targets: tuple[str, ...] | None = None) -> nn.Module:
        """Return `model` with fresh trainable weights, drawn from `config.seed`; everything else is frozen."""
        ...

    def trainable(self, model: nn.Module) -> list[nn.Parameter]:
        """Return the parameters that the optimizer updates, in a fixed order."""
        ...

    def snapshot(self, model: nn.Module, config: RunConfig) -> MethodSnapshot:
        """Copy the trained weights of `model` to the host."""
        ...

    def restore(self, model: nn.Module, folder: Path) -> None:
        """Copy the weights in `folder` into `model`: the inverse of `snapshot(...).write(folder)`."""
        ...

    def save(
        self, model: nn.Module, folder: Path, config: RunConfig, *, written: Callable[[Path], None] | None = None
    ) -> None:
        """Write the result of a run to `folder`, whole or not at all; `written` sees the staged folder first."""
        ...

    def load(self, model: nn.Module, folder: Path, config: RunConfig) -> nn.Module:
        """Return the base `model` with the weights in `folder`, frozen and checked against `config`."""
        ...

    def without(self, model: nn.Module) -> AbstractContextManager[Any]:
        """Within the block `model` answers as its base would."""
        ...

    def is_finished(self, folder: Path) -> bool:
        """Tell whether `folder` holds the result of a finished run."""
        ...

    def merge(self, name: str, weight: torch.Tensor, folder: Path) -> torch.Tensor:
        """Return the trained value of the base's parameter `name`, in fp32, given its base value `weight`."""
        ...
