"""LossMonitor: judge each step by its loss and gradient norm, once they have arrived."""

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
MIN_SEEN = 16  # steps before the rule judges: the first losses fall fast
FACTOR = 8.0  # how many deviations above the median a spike lies
MAD_TO_SIGMA = 1.4826  # the median absolute deviation of a normal distribution is sigma / 1.4826
LEAST_SHARE = 0.02  # of the median: losses that hardly vary are no reason to call 3 % more a spike
LEAST_SPREAD = 0.05  # nats: once the rows are known by heart, 0.01 is followed by 0.1 now and then, and means nothing


class SpikeRule:
    """A loss is a spike above median + 8 · max(1.4826 · MAD, 2 % of the median, 0.05 nats) of the last 64 finite ones.

    Spikes join the window too: when the level really changes, half a window later it is the new normal.
    """

    def __init__(self) -> None:
        self.losses: deque[float] = deque(maxlen=WINDOW)

    def threshold(self) -> float:
        """The loss above which the next step is a spike; infinite while too few steps are seen."""
        if len(self.losses) < MIN_SEEN:
            return float("inf")
        middle = median(self.losses)
        spread = MAD_TO_SIGMA * median(abs(loss - middle) for loss in self.losses)
        return middle + FACTOR * max(spread, LEAST_SHARE * abs(middle), LEAST_SPREAD)

    def add(self, loss: float) -> None:
        """Take a finite loss into the window."""
        self.losses.append(loss)


class LossMonitor:
    """Record steps that are not finite, and spikes, with their rows as `file:line`."""

    def __init__(self, config: RunConfig, rows: Rows, events: EventLog, where: str, allowance: int = 0) -> None:
        self.config, self.rows, self.events, self.where = config, rows, events, where
        self.limit = config.max_bad_steps + allowance
        self.spikes = SpikeRule()
        self.bad_in_a_row = 0

    def start(self, history: Iterable[Mapping[str, Any]], left_out: Collection[int] = ()) -> None:
        """Begin after the steps in transformers' `history`: a resumed run judges as the uninterrupted one."""
        self.spikes, self.bad_in_a_row = SpikeRule(), 0
        for entry in history:
            if "loss" not in entry or entry["step"] in left_out:
                continue
            finite = math.isfinite(entry["loss"]) and math.isfinite(entry["grad_norm"])
            self.bad_in_a_row = 0 if finite else self.bad_in_a_row + 1
            if finite:
                self.spikes.add(entry["loss"])

    def judge(self, numbers: StepNumbers) -> bool:
        """Look at a finished step; True when it spiked. Raises TrainingError after too many bad steps in a row."""
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
        """`file:line` of each row."""
        return [self.rows.source(row) for row in rows]

    def _bad(self, numbers: StepNumbers) -> None:
        self.bad_in_a_row += 1
        words = _words(numbers)
        self.events.record(
            "non_finite",
            numbers.step,
            f"step {numbers.step} was not applied: {words}",
            loss=numbers.loss,
            grad_norm=numbers.grad_norm,
            rows=self.sources(numbers.rows),
        )
        if self.bad_in_a_row >= self.limit:
            seen = f"{self.bad_in_a_row} steps in a row" if self.bad_in_a_row > 1 else "one step"
            raise TrainingError(
                f"the numbers of {seen} were not finite (step {numbers.step}: {words})",
                where=self.where,
                fix="lower lr; no such step was applied, and events.jsonl names its rows",
            )

    def _spike(self, numbers: StepNumbers, threshold: float) -> None:
        usual = median(self.spikes.losses)
        self.events.record(
            "spike",
            numbers.step,
            f"the loss of step {numbers.step} is {numbers.loss:.4g}, and was about {usual:.4g} before",
            loss=numbers.loss,
            median=usual,
            threshold=threshold,
            rows=self.sources(numbers.rows),
        )


def _words(numbers: StepNumbers) -> str:
    return f"loss {_number(numbers.loss)}, gradient norm {_number(numbers.grad_norm)}"


def _number(value: float) -> str:
    return "NaN" if math.isnan(value) else f"{value:.4g}"
