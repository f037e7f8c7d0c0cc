"""EarlySignals: a run that is stopped at once, before its first step or amid one, says so in one sentence."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

from lorafit.errors import TrainingStopped
from lorafit.training.stop_signals import StoppedAtOnce


class EarlySignals:
    """Within it SIGTERM unwinds as Ctrl-C does, and SIGUSR1 is ignored, for there is nothing to save yet.

    StopSignals takes their place while training runs. KeyboardInterrupt leaves the block as TrainingStopped, once
    everything inside has cleaned up. Handlers can be set in the main thread alone: elsewhere they are left alone.
    """

    def __init__(self) -> None:
        self.before: dict[int, Any] = {}
        self.stop = signal.SIGINT

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self.before[signal.SIGTERM] = signal.signal(signal.SIGTERM, self._stop)
            self.before[signal.SIGUSR1] = signal.signal(signal.SIGUSR1, self._ignore)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self.before.items():
            # None: it was set outside Python, and cannot be set back from here
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self.before.clear()
        if isinstance(error, StoppedAtOnce):
            fix = "the same command, without --restart, goes on from the newest checkpoint"
            name = signal.Signals(error.number).name
            raise TrainingStopped(error.number, f"a second signal, {name}, ended the run at once", fix=fix) from error
        if isinstance(error, KeyboardInterrupt):
            raise TrainingStopped(self.stop, f"{self.stop.name} before training began; nothing was lost") from error

    def _stop(self, number: int, frame: FrameType | None) -> None:
        # not an Exception: no `except Exception` of a library on the way may swallow it
        self.stop = signal.Signals(number)
        raise KeyboardInterrupt

    def _ignore(self, number: int, frame: FrameType | None) -> None:
        """SIGUSR1 would kill a process that has no handler; one that is ignored would stay so in its children."""
