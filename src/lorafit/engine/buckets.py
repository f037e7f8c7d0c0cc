"""Bucket: a size that micro-batches of similar size share once they are filled up, and a filled one in one tensor.

What a CUDA graph computes is fixed when it is recorded, shapes included; which rows it computes it for is not.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from lorafit.engine.attention_op import ROUND_WIDTH
from lorafit.engine.batch import MicroBatch
from lorafit.engine.segments import Segments, layout_on, on_host
from lorafit.engine.vocabulary_loss import IGNORED

SIZES = 16
"""Sizes up to the largest, equally far apart: steps of a like number of examples differ by a share of that."""
LEAST_STEP, LEAST_ROWS = 64, 8
BLOCK = 128
"""The longest row is rounded up to a multiple of this, the rows of a block of attention."""


@dataclass(frozen=True, slots=True)
class Bucket:
    """Sizes of a filled micro-batch: its tokens, its rows, the most tokens of a row, and its supervised tokens;
    `even`: all rows are that long."""

    tokens: int
    rows: int
    longest: int
    supervised: int
    even: bool

    @classmethod
    def of(cls, batch: MicroBatch, most: int, longest: int) -> Bucket:
        """The one that `batch` goes into, where none has more than `most` tokens, and no row more than `longest`.

        Rows of one round length, which fixed-length data has, make a bucket of their own: cuDNN takes them.
        """
        step = _rounded(-(-most // SIZES), LEAST_STEP)
        rows, width, *others = on_host(batch.segments.layout).tolist()
        if not others and rows * width == batch.tokens and width % ROUND_WIDTH == 0:
            return cls(batch.tokens, rows, width, _supervised(batch, batch.tokens, step), even=True)
        tokens = _rounded(batch.tokens, step)
        # one row more for the filler, which is less than a step
        filled = max(LEAST_ROWS, 1 << batch.segments.boundaries.shape[0].bit_length())
        most_of_row = _rounded(max(longest, step), BLOCK)
        return cls(tokens, filled, most_of_row, _supervised(batch, tokens, step), even=False)

    @property
    def size(self) -> int:
        """Numbers in a filled micro-batch."""
        return 2 * self.tokens + 2 * self.supervised + self.rows + 1

    def filled(self, batch: MicroBatch) -> torch.Tensor:
        """`batch`, on the CPU, filled up with a row of unsupervised tokens and with empty rows: `size` numbers.

        Filler attends to itself alone and has no loss, so that it adds zeros to the adapters' gradients.
        """
        extra, spare = self.tokens - batch.tokens, self.supervised - batch.supervised
        boundaries = batch.segments.boundaries.numpy()
        parts = (
            _with(batch.ids[0].numpy(), np.zeros(extra, np.int64)),
            _with(batch.positions[0].numpy(), np.arange(extra)),
            # from the end, where the filler is: a token with many gradients to add up takes its time
            _with(batch.predictors.numpy(), np.arange(self.tokens - spare, self.tokens)),
            _with(batch.targets.numpy(), np.full(spare, IGNORED)),
            _with(boundaries, np.full(self.rows + 1 - len(boundaries), self.tokens)),
        )
        return torch.from_numpy(np.concatenate(parts))

    def batch_of(self, filled: torch.Tensor) -> MicroBatch:
        """The micro-batch in `filled` (size,) int64, on its device; its tensors are views, but for the boundaries."""
        sizes = [self.tokens, self.tokens, self.supervised, self.supervised, self.rows + 1]
        ids, positions, predictors, targets, boundaries = filled.split(sizes)
        # two tensors: one handed over twice would have compiled layers made anew
        gather, scatter = (torch.arange(self.tokens, device=filled.device) for _ in range(2))
        # a second, empty group says that the rows' lengths are known to `boundaries` alone
        layout = torch.tensor([self.rows, self.longest, *([] if self.even else [0, 0])])
        segments = Segments(boundaries.to(torch.int32), gather, scatter, layout_on(filled.device, layout))
        return MicroBatch(ids[None], positions[None], predictors, targets, segments)


def _supervised(batch: MicroBatch, tokens: int, step: int) -> int:
    """In steps twice as large: each size is a graph, and the head's share of the work is small."""
    return min(_rounded(max(batch.supervised, 1), 2 * step), tokens)


def _rounded(size: int, step: int) -> int:
    """The next multiple of `step`."""
    return -(-size // step) * step


def _with(values: NDArray[np.integer], more: NDArray[np.integer]) -> NDArray[np.int64]:
    return np.concatenate([values, more]).astype(np.int64)
