"""Sft: the loss of supervised fine-tuning, cross entropy over the supervised tokens."""

from __future__ import annotations

import numpy as np
from torch import Tensor, nn

from lorafit.data import Rows
from lorafit.engine import MicroBatch, VocabularyLoss, collate
from lorafit.objectives.objective import Indices


class Sft:
    """Summed cross entropy over supervised tokens, to be divided by their number over the whole step.

    `vocabulary_loss` says how logits become a loss; by default it is what the model family's table says.
    """

    name = "sft"

    def __init__(self, vocabulary_loss: VocabularyLoss | None = None) -> None:
        self.vocabulary_loss = vocabulary_loss

    def collate(self, rows: Rows, indices: Indices) -> MicroBatch:
        """Lay the rows at `indices` one after another into one micro-batch, on the host."""
        return collate([(rows.ids(int(row)), rows.mask(int(row))) for row in indices])

    def weight(self, rows: Rows, indices: Indices | None = None) -> int:
        """Return the supervised tokens of these rows, or of all."""
        supervised = rows.supervised if indices is None else rows.supervised[np.asarray(indices, dtype=np.int64)]
        return int(supervised.sum())

    def loss(self, model: nn.Module, micro_batch: MicroBatch, scale: Tensor | float = 1.0) -> Tensor:
        """Return the summed loss of `micro_batch` times `scale`."""
        how = self.vocabulary_loss or VocabularyLoss.expected(model)
        return how.summed(model, micro_batch, scale)
