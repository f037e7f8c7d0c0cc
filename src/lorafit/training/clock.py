"""TrainingClock: seconds spent training, without those spent evaluating and saving."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class TrainingClock:
    """Runs from `start`; stands still within `stopped()`."""

    def __init__(self) -> None:
        self.began: float | None = None
        self.counted_s = 0.0

    def start(self) -> None:
        """Run from here on; a clock that runs goes on running."""
        if self.began is None:
            self.began = time.perf_counter()

    def stop(self) -> None:
        """Stand still."""
        self.counted_s, self.began = self.elapsed_s, None

    @property
    def elapsed_s(self) -> float:
        """Seconds counted so far."""
        return self.counted_s + (time.perf_counter() - self.began if self.began is not None else 0.0)

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Within it time does not count."""
        ran = self.began is not None
        self.stop()
        try:
            yield
        finally:
            if ran:
                self.start()
