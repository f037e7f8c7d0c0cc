"""Progress: how far a long reading has come. Rooms report it; only cli/ draws it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Progress:
    """`stage` in words, rows so far, bytes of all files, and seconds gone and (by bytes) still to go."""

    stage: str
    rows: int
    bytes_done: int
    bytes_total: int
    elapsed_s: float
    eta_s: float | None


Listener = Callable[[Progress], None]


class Clock:
    """Turns counts into `Progress` reports, at most ten a second."""

    def __init__(self, listener: Listener | None, bytes_total: int) -> None:
        self.listener, self.bytes_total = listener, bytes_total
        self.started, self.last = time.monotonic(), 0.0

    def report(self, stage: str, rows: int, bytes_done: int, *, force: bool = False) -> None:
        """Tell the listener, if there is one and it has not just been told."""
        now = time.monotonic()
        if self.listener is None or (now - self.last < 0.1 and not force):
            return
        self.last, elapsed = now, now - self.started
        share = bytes_done / self.bytes_total if self.bytes_total else 0.0
        eta = elapsed * (1 - share) / share if share > 0 else None
        self.listener(Progress(stage, rows, bytes_done, self.bytes_total, elapsed, eta))
