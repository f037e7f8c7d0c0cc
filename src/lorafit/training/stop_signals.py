"""StopSignals: SIGINT and SIGTERM end a run after a whole step, SIGUSR1 asks for a checkpoint."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Protocol, Self

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lorafit.training.checkpoint_writer import CheckpointWriter

STOPPING = (signal.SIGINT, signal.SIGTERM)


class EvaluationStopped(Exception):
    """Raised between two micro-batches of an evaluation, which is then owed. Never reaches a user."""


class StoppedAtOnce(KeyboardInterrupt):
    """A second stopping signal, `number`, fell while training ran."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


class StopSignals:
    """Within it the signals are only noted; a second stopping signal raises StoppedAtOnce where it falls.

    Handlers can be set in the main thread alone: elsewhere this does nothing. `said` is called in the handler with
    the signal's number.
    """

    def __init__(self, said: Callable[[int], None] | None = None) -> None:
        self.said = said
        self.stop: int | None = None
        self.save = False
        self.before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in STOPPING:
                self.before[number] = signal.signal(number, self._stop)
            self.before[signal.SIGUSR1] = signal.signal(signal.SIGUSR1, self._save)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self.before.items():
            # None: it was set outside Python, and cannot be set back from here
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self.before.clear()

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if self.stop is not None:
            raise StoppedAtOnce(number)
        self.stop = number
        if self.said is not None:
            self.said(number)

    def _save(self, number: int, frame: FrameType | None) -> None:
        self.save = True


class Signalled(Protocol):
    """The trainer, as far as this file needs it."""

    signals: StopSignals
    checkpoints: CheckpointWriter


class ObeySignals(TrainerCallback):
    """At the end of a step: passes on what the signals ask for, and reports a checkpoint that could not be written."""

    def __init__(self, trainer: Signalled) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        # a resumed Trainer goes by the intervals in its checkpoint; today's settings are meant
        state.compute_steps(args, state.max_steps)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        signals = self.trainer.signals
        self.trainer.checkpoints.poll()
        if signals.stop is not None:
            control.should_save = control.should_training_stop = True
        if signals.save:
            control.should_save, signals.save = True, False
