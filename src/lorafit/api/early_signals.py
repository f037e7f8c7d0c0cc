"""EarlySignals: a run that is stopped at once, before its first step or amid one, says so in one sentence. No torch."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType

from lorafit.config.signal_handlers import STOPPING, SignalHandlers
from lorafit.errors import StoppedAtOnce, TrainingStopped
from lorafit.runs import RunDir


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
