"""Objective: the protocol of losses. Supervised fine-tuning implements it."""

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
    """Compute the loss of packed rows for the training loop.

    `OBJECTIVES` makes one a run, of the model's `VocabularyLoss`. Where its `padded` is True, the rows of a micro-batch
    are padded to one width.
    """

    name: str
    """The value of the setting that chooses this objective."""

    def collate(self, rows: Rows, indices: Indices) -> MicroBatch:
        """Pack the rows at `indices` into one micro-batch, on the host."""
        ...

    def weight(self, rows: Rows, indices: Indices | None = None) -> float:
        """Return the divisor of the loss for these rows, or for all. For SFT it counts supervised tokens.

        The weights of two sets of rows add up to that of both. The rows of a step must have a weight above 0.
        """
        ...

    def loss(self, model: nn.Module, micro_batch: MicroBatch, scale: Tensor | float = 1.0) -> Tensor:
        """Return the summed loss of `micro_batch` times `scale`, a scalar for `backward`.

        `scale` is 1 / `weight` of the whole step, and 1 in an evaluation. Targets of -100 are padding and have no loss.
        """
        ...
