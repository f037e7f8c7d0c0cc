"""StepDataset: which examples make up each optimizer step, and how they are packed for this process."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from lorafit.config import RunConfig
from lorafit.data import Rows, epoch_order, steps_per_epoch
from lorafit.engine import MicroBatch, Step, collate
from lorafit.training.layout import Layout


class StepDataset(torch.utils.data.Dataset[Step]):
    """Item i is the i-th step of the current epoch: the same examples whatever the layout or the process count.

    Examples are shuffled by (seed, epoch) and taken `examples_per_step` at a time. With several processes each
    gets every `world`-th micro-batch; where their number does not divide, the last ones are repeats that
    supervise nothing, so that all processes run the same number of forwards.
    """

    def __init__(
        self, rows: Rows, config: RunConfig, layout: Layout | None = None, *, rank: int = 0, world: int = 1
    ) -> None:
        self.rows, self.config, self.rank, self.world = rows, config, rank, world
        self.layout = layout or Layout(config.max_length)
        self.order = np.arange(0)
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Shuffle for `epoch`; the Trainer calls it before each."""
        self.order = epoch_order(len(self.rows), self.config.seed, epoch)

    def __len__(self) -> int:
        return steps_per_epoch(len(self.rows), self.config.examples_per_step)

    def __getitem__(self, index: int) -> Step:
        if not 0 <= index < len(self):
            raise IndexError(index)
        size = self.config.examples_per_step
        return self.step_of(self.order[index * size : (index + 1) * size])

    def step_of(self, chosen: Sequence[int] | np.ndarray) -> Step:
        """The step over these rows, in today's layout."""
        members = np.asarray(chosen, dtype=np.int64)
        return Step(
            micro_batches=self._own_share(self.layout.of(self.rows.lengths, members)),
            supervised=int(self.rows.supervised[members].sum()),
            tokens=int(self.rows.lengths[members].sum()),
            rows=tuple(int(row) for row in members),
        )

    def _own_share(self, layout: Sequence[np.ndarray]) -> list[MicroBatch]:
        rounds = -(-len(layout) // self.world)
        share = []
        for place in range(self.rank, rounds * self.world, self.world):
            if place < len(layout):
                share.append(pack_rows(self.rows, layout[place]))
            else:
                idle = layout[-1][:1]
                share.append(collate([(self.rows.ids(int(idle[0])), np.zeros(self.rows.lengths[idle[0]], bool))]))
        return share


def pack_rows(rows: Rows, chosen: Sequence[int] | np.ndarray) -> MicroBatch:
    """The chosen rows as one micro-batch."""
    return collate([(rows.ids(int(row)), rows.mask(int(row))) for row in chosen])
