"""Signals: what stops a run, before its first step and while it trains, and what was handled before. No torch."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Mapping
from types import FrameType, TracebackType
from typing import Any, Self

from lorafit.errors import StoppedAtOnce, TrainingStopped
from lorafit.runs.run_dir import RunDir

STOPPING = (signal.SIGINT, signal.SIGTERM)
Handler = Callable[[int, FrameType | None], None]


class SignalHandlers:
    """Within it each signal of `handlers` has its handler.

    Handlers can be set in the main thread alone: elsewhere this does nothing.
    """

    def __init__(self, handlers: Mapping[int, Handler]) -> None:
        self.handlers = handlers
        self.before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number, handler in self.handlers.items():
                self.before[number] = signal.signal(number, handler)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self.before.items():
            # None: it was set outside Python, and cannot be set back from here
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self.before.clear()


class _Stopped(BaseException):
    """The signal `number` has come. No Exception, so that no library on the way swallows it.

    No KeyboardInterrupt: one that passes through Python that C++ runs, as in torch's import, takes the exit code.
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


class EarlySignals(SignalHandlers):
    """Within it SIGINT and SIGTERM unwind, and SIGUSR1 is ignored, for there is nothing to save yet.

    StopSignals takes their place while training runs. A stop leaves the block as TrainingStopped, once everything
    inside has cleaned up. `run`, once it is known, tells whether there is a checkpoint to go on from.
    """

    def __init__(self) -> None:
        super().__init__({**dict.fromkeys(STOPPING, self._stop), signal.SIGUSR1: self._ignore})
        self.run: RunDir | None = None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        if isinstance(error, StoppedAtOnce):
            there_is_one = self.run is not None and self.run.has_checkpoint
            begins = (
                "goes on from the newest checkpoint" if there_is_one else "begins again: there is no checkpoint yet"
            )
            fix = f"the same command, without --restart, {begins}"
            name = signal.Signals(error.number).name
            raise TrainingStopped(error.number, f"a second signal, {name}, ended the run at once", fix=fix) from error
        if isinstance(error, _Stopped):
            name = signal.Signals(error.number).name
            raise TrainingStopped(error.number, f"{name} before training began; nothing was lost") from error

    def _stop(self, number: int, frame: FrameType | None) -> None:
        raise _Stopped(number)

    def _ignore(self, number: int, frame: FrameType | None) -> None:
        """SIGUSR1 would kill a process that has no handler; one that is ignored would stay so in its children."""


class StopSignals(SignalHandlers):
    """Note signals while training runs: SIGINT and SIGTERM end it after a whole step, SIGUSR1 asks for a checkpoint.

    A second stopping signal raises StoppedAtOnce where it falls. `said` is called in the handler with the signal's
    number.
    """

    def __init__(self, said: Callable[[int], None] | None = None) -> None:
        super().__init__({**dict.fromkeys(STOPPING, self._stop), signal.SIGUSR1: self._save})
        self.said = said
        self.stop: int | None = None
        self.save = False

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if self.stop is not None:
            raise StoppedAtOnce(number)
        self.stop = number
        if self.said is not None:
            self.said(number)

    def _save(self, number: int, frame: FrameType | None) -> None:
        self.save = True
