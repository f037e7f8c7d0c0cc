"""TrainingProgress: turns the Trainer's events into `StepProgress` values for whoever shows them."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from lorafit.training.clock import TrainingClock
from lorafit.training.step_log import StepNumbers
from lorafit.training.trainer_library import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


@dataclass(frozen=True, slots=True)
class StepProgress:
    """Where training stands after a step."""

    step: int
    steps: int
    loss: float
    learning_rate: float
    tokens_per_s: float
    memory_bytes: int
    eta_s: float
    eval_loss: float | None = None


class Reporter(Protocol):
    """The trainer, as far as progress needs it: its clock, and the step that is being reported."""

    clock: TrainingClock
    reported: StepNumbers | None


class TrainingProgress(TrainerCallback):
    """Calls `show` after every step; tokens a second count every packed token, and only training time."""

    def __init__(self, show: Callable[[StepProgress], None], trainer: Reporter) -> None:
        self.show, self.trainer = show, trainer
        self.tokens, self.steps = 0, 0  # of this process: a resumed run measures its own speed
        self.eval_loss: float | None = None

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        logs = given.get("logs") or {}
        if "eval_loss" in logs:
            self.eval_loss = float(logs["eval_loss"])
        if "loss" not in logs or not state.is_world_process_zero:
            return
        assert self.trainer.reported is not None
        self.tokens, self.steps = self.tokens + self.trainer.reported.tokens, self.steps + 1
        elapsed_s = max(self.trainer.clock.elapsed_s, 1e-9)
        self.show(
            StepProgress(
                step=state.global_step,
                steps=state.max_steps,
                loss=float(logs["loss"]),
                learning_rate=float(logs.get("learning_rate", 0.0)),
                tokens_per_s=self.tokens / elapsed_s,
                memory_bytes=memory_in_use(),
                eta_s=(state.max_steps - state.global_step) * elapsed_s / self.steps,
                eval_loss=self.eval_loss,
            )
        )


def memory_in_use() -> int:
    """Peak bytes: reserved on the card where there is one, else resident in this process."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_reserved())
    scale = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is bytes on macOS, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
