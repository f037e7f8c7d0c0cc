"""Callbacks: transformers' callbacks and trackers, called at every stage of the loop as its own Trainer does."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from lorafit.training.checkpoints.snapshot import TRAINER_STATE
from lorafit.training.optimization import (
    CallbackHandler,
    DefaultFlowCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    get_reporting_integration_callbacks,
)


class Callbacks:
    """Whoever watches the loop or asks something of it.

    Attributes:
        handler: transformers' list of callbacks; its own one asks for evaluations and checkpoints by intervals.
        state: step, epoch and history of the run.
        control: what callbacks ask for: to evaluate, to save, to stop.
    """

    def __init__(
        self,
        arguments: TrainingArguments,
        model: nn.Module,
        callbacks: Sequence[TrainerCallback],
        *,
        epoch_steps: int,
        is_main: bool,
    ) -> None:
        self.arguments, self.epoch_steps, self.is_main = arguments, epoch_steps, is_main
        self.state, self.control = self._state_of(None), TrainerControl()
        trackers = get_reporting_integration_callbacks(arguments.report_to)
        self.handler = CallbackHandler([DefaultFlowCallback, *trackers, *callbacks], model, None, None, None)
        self.at("on_init_end")

    def at(self, event: str, *more: Any) -> None:
        """Call `event` of every callback."""
        self.control = getattr(self.handler, event)(self.arguments, self.state, self.control, *more)

    def begin(self, checkpoint: Path | None, optimizer: Any, lr_scheduler: Any) -> None:
        """Take up step, epoch and history of `checkpoint`, or of the first step."""
        self.state = self._state_of(checkpoint)
        self.handler.optimizer, self.handler.lr_scheduler = optimizer, lr_scheduler

    def log(self, logs: dict[str, float], step: int, epoch: float | None) -> None:
        """Add `logs` to the history; callbacks see the state of the step that the logs belong to."""
        logs = {**logs, "epoch": epoch or 0.0}
        self.state.log_history.append({**logs, "step": step})
        then = copy.copy(self.state)
        then.global_step, then.epoch = step, epoch or 0.0
        self.control = self.handler.on_log(self.arguments, then, self.control, logs)

    def stop(self, *, save: bool = False) -> None:
        """End the loop after this step, with a checkpoint where `save` says so."""
        self.control.should_training_stop = True
        self.control.should_save = self.control.should_save or save

    def _state_of(self, checkpoint: Path | None) -> TrainerState:
        """Return transformers' state at the first step, or at `checkpoint`, with today's intervals."""
        state = TrainerState() if checkpoint is None else TrainerState.load_from_json(str(checkpoint / TRAINER_STATE))
        state.train_batch_size = 1
        state.max_steps = self.arguments.max_steps
        state.num_train_epochs = math.ceil(state.max_steps / self.epoch_steps)
        state.is_local_process_zero = state.is_world_process_zero = self.is_main
        state.compute_steps(self.arguments, state.max_steps)
        return state
