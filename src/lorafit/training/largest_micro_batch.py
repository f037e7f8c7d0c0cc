"""The largest micro-batch of a run: what the rehearsal runs before the first step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lorafit.config import RunConfig
from lorafit.data import Rows
from lorafit.engine import MicroBatch
from lorafit.training.layout import Layout
from lorafit.training.steps import StepDataset, pack_rows

STEPS_SEEN = 512
"""Steps of the first epoch that are looked through: their lengths alone, which takes milliseconds."""


def largest_micro_batch(
    rows: Rows, config: RunConfig, micro_tokens: int, step: Sequence[int] | NDArray[np.integer] = ()
) -> MicroBatch:
    """The one with the most tokens, among the first epoch's steps, `step` (row numbers, of the largest step where it
    is known) and the longest row alone, when none may have more than `micro_tokens`."""
    layout, most = Layout(micro_tokens), 0
    largest = np.array([rows.lengths.argmax()])
    for chosen in (largest, np.asarray(step, dtype=np.int64), *_first_steps(rows, config)):
        for members in layout.of(rows.lengths, chosen):
            if (tokens := int(rows.lengths[members].sum())) > most:
                largest, most = members, tokens
        if most >= micro_tokens:
            break  # none is larger
    return pack_rows(rows, largest)


def _first_steps(rows: Rows, config: RunConfig) -> list[NDArray[np.int64]]:
    """Row numbers of the first epoch's first steps."""
    order = StepDataset(rows, config).order[: STEPS_SEEN * config.examples_per_step]
    return [order[start : start + config.examples_per_step] for start in range(0, len(order), config.examples_per_step)]
