"""The largest micro-batch of a run: what the rehearsal runs before the first step."""

from __future__ import annotations

import numpy as np

from lorafit.config import RunConfig
from lorafit.data import Rows
from lorafit.engine import MicroBatch
from lorafit.training.layout import Layout
from lorafit.training.steps import StepDataset, pack_rows

STEPS_SEEN = 512
"""Steps of the first epoch that are looked through: their lengths alone, which takes milliseconds."""


def largest_micro_batch(rows: Rows, config: RunConfig, micro_tokens: int) -> MicroBatch:
    """The one with the most tokens, among the first epoch's steps and the longest row alone."""
    steps = StepDataset(rows, config, Layout(micro_tokens))
    largest = np.array([rows.lengths.argmax()])
    for index in range(min(len(steps), STEPS_SEEN)):
        chosen = steps.order[index * config.examples_per_step : (index + 1) * config.examples_per_step]
        for members in steps.layout.of(rows.lengths, chosen):
            if rows.lengths[members].sum() > rows.lengths[largest].sum():
                largest = members
    return pack_rows(rows, largest)
