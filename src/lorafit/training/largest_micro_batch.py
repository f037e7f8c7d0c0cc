"""The largest micro-batch of a run: what the rehearsal runs before the first step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

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
    most, largest = 0, np.array([rows.lengths.argmax()])
    for tokens, members in _micro_batches(rows, config, micro_tokens, step):
        if tokens > most:
            most, largest = tokens, members
        if most >= micro_tokens:
            break  # none is larger
    return pack_rows(rows, largest)


def largest_within(
    rows: Rows, config: RunConfig, micro_tokens: int, limit: int, step: Sequence[int] | NDArray[np.integer] = ()
) -> MicroBatch | None:
    """The one with the most tokens of those with at most `limit`, cut in the same way; None where all have more."""
    most, largest = 0, None
    for tokens, members in _micro_batches(rows, config, micro_tokens, step):
        if most < tokens <= limit:
            most, largest = tokens, members
    return None if largest is None else pack_rows(rows, largest)


def _micro_batches(
    rows: Rows, config: RunConfig, micro_tokens: int, step: Sequence[int] | NDArray[np.integer]
) -> Iterator[tuple[int, NDArray[np.integer]]]:
    """Tokens and row numbers of the longest row alone, and of the micro-batches of `step` and the first steps."""
    layout = Layout(micro_tokens)
    longest = np.array([rows.lengths.argmax()])
    for chosen in (longest, np.asarray(step, dtype=np.int64), *_first_steps(rows, config)):
        for members in layout.of(rows.lengths, chosen):
            yield int(rows.lengths[members].sum()), members


def _first_steps(rows: Rows, config: RunConfig) -> list[NDArray[np.int64]]:
    """Row numbers of the first epoch's first steps."""
    order = StepDataset(rows, config).order[: STEPS_SEEN * config.examples_per_step]
    return [order[start : start + config.examples_per_step] for start in range(0, len(order), config.examples_per_step)]
