"""Sft: the cross entropy of supervised fine-tuning."""

from __future__ import annotations

import numpy as np
from torch import Tensor, nn

from lorafit.data import Rows
from lorafit.engine import MicroBatch, VocabularyLoss, collate
from lorafit.objectives.objective import Indices


class Sft:
    """Sum the cross entropy over supervised tokens. The loop divides it by their number in the step.

    `vocabulary_loss` turns logits into a loss; its default comes from the table of model families.
    """

    name = "sft"

    def __init__(self, vocabulary_loss: VocabularyLoss | None = None) -> None:
        self.vocabulary_loss = vocabulary_loss

    def collate(self, rows: Rows, indices: Indices) -> MicroBatch:
        """Pack the rows at `indices` into one micro-batch, on the host."""
        padded = self.vocabulary_loss is not None and self.vocabulary_loss.padded
        return collate([(rows.ids(int(row)), rows.mask(int(row))) for row in indices], padded=padded)

    def weight(self, rows: Rows, indices: Indices | None = None) -> int:
        """Return the number of supervised tokens in these rows, or in all."""
        supervised = rows.supervised if indices is None else rows.supervised[np.asarray(indices, dtype=np.int64)]
        return int(supervised.sum())

    def loss(self, model: nn.Module, micro_batch: MicroBatch, scale: Tensor | float = 1.0) -> Tensor:
        """Return the summed loss of `micro_batch` times `scale`."""
        vocabulary_loss = self.vocabulary_loss or VocabularyLoss.expected(model)
        return vocabulary_loss.summed(model, micro_batch, scale)
