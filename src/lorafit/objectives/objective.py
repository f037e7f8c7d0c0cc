"""Objective: the door for losses. Supervised fine-tuning is one; preference losses are the next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor, nn

from lorafit.data import Rows
from lorafit.engine import MicroBatch


class Objective(Protocol):
    """What the training loop asks of a loss. Its rows are packed; a step is a set of examples."""

    name: str

    def collate(self, rows: Rows, indices: Sequence[int]) -> MicroBatch:
        """Lay the rows at `indices` one after another into one micro-batch, on the host."""
        ...

    def weight(self, rows: Rows, indices: Sequence[int]) -> int:
        """Return what a step's loss is divided by, summed over its rows: for SFT, supervised tokens."""
        ...

    def loss(self, model: nn.Module, micro_batch: MicroBatch, scale: Tensor | float) -> Tensor:
        """Return the summed loss of `micro_batch` times `scale`, a scalar to call `backward` on."""
        ...
