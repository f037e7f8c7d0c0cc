"""Signals: handlers that stop a run before its first step and during training. No torch."""

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
    """Install a handler for each signal of `handlers` within a `with` block.

    Only the main thread can install handlers. In other threads the block does nothing.
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
            # None: the handler was set outside Python, which cannot restore it
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self.before.clear()


class _Stopped(BaseException):
    """The signal `number` arrived.

    It is no Exception, so that no library catches it. It is no KeyboardInterrupt either: in Python code that C++ runs,
    such as torch's import, that would set the exit code.
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


class EarlySignals(SignalHandlers):
    """Unwind on SIGINT and SIGTERM, and ignore SIGUSR1, within a `with` block.

    There is nothing to save yet. During training StopSignals replaces these handlers. A stop leaves the block as
    TrainingStopped, after everything inside has cleaned up.

    Attributes:
        run: The run directory, once it is known. The message says whether it holds a checkpoint to resume from.
    """

    def __init__(self) -> None:
        super().__init__({**dict.fromkeys(STOPPING, self._stop), signal.SIGUSR1: self._ignore})
        self.run: RunDir | None = None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        if isinstance(error, StoppedAtOnce):
            can_resume = self.run is not None and self.run.has_checkpoint
            effect = "resumes from the newest checkpoint" if can_resume else "starts over: there is no checkpoint yet"
            fix = f"the same command, without --restart, {effect}"
            name = signal.Signals(error.number).name
            what = f"a second signal, {name}, ended the run immediately"
            raise TrainingStopped(error.number, what, fix=fix) from error
        if isinstance(error, _Stopped):
            name = signal.Signals(error.number).name
            raise TrainingStopped(error.number, f"{name} stopped the run before training, nothing was lost") from error

    def _stop(self, number: int, frame: FrameType | None) -> None:
        raise _Stopped(number)

    def _ignore(self, number: int, frame: FrameType | None) -> None:
        """Ignore SIGUSR1, which kills a process without a handler.

        SIG_IGN would also be inherited by child processes, and a Python handler is not.
        """


class StopSignals(SignalHandlers):
    """Record signals during training, within a `with` block.

    SIGINT and SIGTERM stop it after a complete step, and SIGUSR1 saves a checkpoint. A second stopping signal raises
    StoppedAtOnce immediately.

    Attributes:
        on_stop: Called in the handler with the signal's number.
        stop: Number of the first stopping signal; None before one.
        save: Whether a checkpoint was requested.
    """

    def __init__(self, on_stop: Callable[[int], None] | None = None) -> None:
        super().__init__({**dict.fromkeys(STOPPING, self._stop), signal.SIGUSR1: self._save})
        self.on_stop = on_stop
        self.stop: int | None = None
        self.save = False

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if self.stop is not None:
            raise StoppedAtOnce(number)
        self.stop = number
        if self.on_stop is not None:
            self.on_stop(number)

    def _save(self, number: int, frame: FrameType | None) -> None:
        self.save = True
