"""Objective: the door for losses. Supervised fine-tuning is one; preference losses are the next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from lorafit.data import Rows
from lorafit.engine import MicroBatch

Indices = Sequence[int] | NDArray[np.integer]


class Objective(Protocol):
    """What the training loop asks of a loss. Its rows are packed; a step is a set of examples."""

    name: str
    """The value of the setting that chooses this objective."""

    def collate(self, rows: Rows, indices: Indices) -> MicroBatch:
        """Lay the rows at `indices` one after another into one micro-batch, on the host."""
        ...

    def weight(self, rows: Rows, indices: Indices | None = None) -> int:
        """Return what the loss of these rows, or of all, is divided by: for SFT, supervised tokens."""
        ...

    def loss(self, model: nn.Module, micro_batch: MicroBatch, scale: Tensor | float = 1.0) -> Tensor:
        """Return the summed loss of `micro_batch` times `scale`, a scalar to call `backward` on."""
        ...
