"""StopSignals: SIGINT and SIGTERM end a run after a whole step; SIGUSR1, or the time, asks for a checkpoint."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType
from typing import Any, Protocol

from lorafit.config import RunConfig
from lorafit.config.signal_handlers import STOPPING, SignalHandlers
from lorafit.errors import StoppedAtOnce
from lorafit.training.checkpoint_writer import CheckpointWriter
from lorafit.training.numbers import MIN_SEEN
from lorafit.training.save_timer import SaveTimer
from lorafit.training.trainer_library import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class EvaluationStopped(Exception):
    """Raised between two micro-batches of an evaluation, which is then owed. Never reaches a user."""


class StopSignals(SignalHandlers):
    """Within it the signals are only noted; a second stopping signal raises StoppedAtOnce where it falls.

    `said` is called in the handler with the signal's number.
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


class Signalled(Protocol):
    """The trainer, as far as this file needs it."""

    signals: StopSignals
    checkpoints: CheckpointWriter
    save_timer: SaveTimer
    config: RunConfig


class ObeySignals(TrainerCallback):
    """At the end of a step: passes on what the signals and the time ask for, and reports a checkpoint that failed."""

    def __init__(self, trainer: Signalled) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        # a resumed Trainer goes by the intervals in its checkpoint; today's settings are meant
        state.compute_steps(args, state.max_steps)
        self.trainer.save_timer.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        signals = self.trainer.signals
        self.trainer.checkpoints.poll()
        if signals.stop is not None:
            control.should_save = control.should_training_stop = True
        if signals.save or self._is_due(args, state):
            control.should_save, signals.save = True, False

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.trainer.save_timer.start()

    def _is_due(self, args: TrainingArguments, state: TrainerState) -> bool:
        # before any loss can be called a spike: whether there is a checkpoint to go back to is no matter of time
        if self.trainer.config.on_spike == "rollback" and state.global_step == MIN_SEEN:
            return True
        # several processes have several clocks, and have to save in the same step
        return args.world_size == 1 and self.trainer.save_timer.is_due()
