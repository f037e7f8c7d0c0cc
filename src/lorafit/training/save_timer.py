"""SaveTimer: when a checkpoint is due by the clock, so that an hour of steps is never lost for a long epoch."""

from __future__ import annotations

import time
from collections.abc import Callable


class SaveTimer:
    """A checkpoint is due `minutes` after the last one, or after training began; 0: never.

    `now` gives seconds that no change of the wall clock moves.
    """

    def __init__(self, minutes: float, now: Callable[[], float] = time.monotonic) -> None:
        self.seconds, self.now = minutes * 60, now
        self.since = now()

    def start(self) -> None:
        """Count from here on: training begins, or a checkpoint is written."""
        self.since = self.now()

    def is_due(self) -> bool:
        """True once the time is over; the clock is read once."""
        return self.seconds > 0 and self.now() - self.since >= self.seconds
