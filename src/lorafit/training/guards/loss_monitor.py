"""LossMonitor: judge each step by its loss and gradient norm."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Iterable, Mapping
from statistics import median
from typing import Any

from lorafit.config import RunConfig
from lorafit.data import Rows
from lorafit.errors import TrainingError
from lorafit.training.logging.progress import StepNumbers
from lorafit.training.logging.run_logs import EventLog

WINDOW = 64  # finite losses that the median is taken over
MIN_SEEN = 16  # steps before the rule applies, since the first losses fall fast
FACTOR = 8.0  # how many deviations above the median a spike lies
MAD_TO_SIGMA = 1.4826  # the median absolute deviation of a normal distribution is sigma / 1.4826
LEAST_SHARE = 0.02  # of the median: with nearly constant losses, 3 % more is no spike
LEAST_SPREAD = 0.05  # nats: on memorized rows a loss of 0.1 after 0.01 means nothing


class SpikeRule:
    """Call a loss a spike above a threshold over the last 64 finite losses.

    The threshold is median + 8 · max(1.4826 · MAD, 2 % of the median, 0.05 nats). Spikes join the window too: when the
    level really changes, it is the new normal half a window later.
    """

    def __init__(self) -> None:
        self.losses: deque[float] = deque(maxlen=WINDOW)

    def threshold(self) -> float:
        """Return the loss above which the next step is a spike. It is infinite for the first steps."""
        if len(self.losses) < MIN_SEEN:
            return float("inf")
        middle = median(self.losses)
        spread = MAD_TO_SIGMA * median(abs(loss - middle) for loss in self.losses)
        return middle + FACTOR * max(spread, LEAST_SHARE * abs(middle), LEAST_SPREAD)

    def add(self, loss: float) -> None:
        """Add a finite loss to the window."""
        self.losses.append(loss)


class LossMonitor:
    """Record spikes and steps that are not finite, with their rows as `file:line`."""

    def __init__(self, config: RunConfig, rows: Rows, events: EventLog, where: str, allowance: int = 0) -> None:
        self.config, self.rows, self.events, self.where = config, rows, events, where
        self.limit = config.max_bad_steps + allowance
        self.spikes = SpikeRule()
        self.bad_in_a_row = 0

    def start(self, history: Iterable[Mapping[str, Any]], left_out: Collection[int] = ()) -> None:
        """Start after the steps in transformers' `history`, so that a resumed run judges alike."""
        self.spikes, self.bad_in_a_row = SpikeRule(), 0
        for entry in history:
            if "loss" not in entry or entry["step"] in left_out:
                continue
            finite = math.isfinite(entry["loss"]) and math.isfinite(entry["grad_norm"])
            self.bad_in_a_row = 0 if finite else self.bad_in_a_row + 1
            if finite:
                self.spikes.add(entry["loss"])

    def judge(self, numbers: StepNumbers) -> bool:
        """Judge a finished step, and return True if it spiked.

        Raises TrainingError after too many bad steps in a row.
        """
        if not numbers.is_finite:
            self._bad(numbers)
            return False
        self.bad_in_a_row = 0
        threshold, spiked = self.spikes.threshold(), False
        if numbers.loss > threshold:
            spiked = True
            self._spike(numbers, threshold)
        self.spikes.add(numbers.loss)
        return spiked

    def sources(self, rows: Iterable[int]) -> list[str]:
        """Return `file:line` of each row."""
        return [self.rows.source(row) for row in rows]

    def _bad(self, numbers: StepNumbers) -> None:
        self.bad_in_a_row += 1
        measured = _described(numbers)
        self.events.record(
            "non_finite",
            numbers.step,
            f"step {numbers.step} was not applied: {measured}",
            loss=numbers.loss,
            grad_norm=numbers.grad_norm,
            rows=self.sources(numbers.rows),
        )
        if self.bad_in_a_row >= self.limit:
            seen = f"{self.bad_in_a_row} steps in a row" if self.bad_in_a_row > 1 else "one step"
            raise TrainingError(
                f"the numbers of {seen} were not finite (step {numbers.step}: {measured})",
                where=self.where,
                fix="lower lr; these steps were not applied, and events.jsonl names their rows",
            )

    def _spike(self, numbers: StepNumbers, threshold: float) -> None:
        usual = median(self.spikes.losses)
        self.events.record(
            "spike",
            numbers.step,
            f"the loss of step {numbers.step} is {numbers.loss:.4g}; the median before it is {usual:.4g}",
            loss=numbers.loss,
            median=usual,
            threshold=threshold,
            rows=self.sources(numbers.rows),
        )


def _described(numbers: StepNumbers) -> str:
    return f"loss {_number(numbers.loss)}, gradient norm {_number(numbers.grad_norm)}"


def _number(value: float) -> str:
    return "NaN" if math.isnan(value) else f"{value:.4g}"
