"""TrainingProgress: turns the Trainer's events into `StepProgress` values for whoever shows them."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


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


class TrainingProgress(TrainerCallback):
    """Calls `show` after every step; tokens a second count every packed token, and only training time."""

    def __init__(self, show: Callable[[StepProgress], None], step_tokens: Callable[[], int]) -> None:
        self.show, self.step_tokens = show, step_tokens
        self.tokens, self.training_s, self.began = 0, 0.0, 0.0
        self.eval_loss: float | None = None

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.began = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.training_s += time.perf_counter() - self.began
        self.tokens += self.step_tokens()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        logs = given.get("logs") or {}
        if "eval_loss" in logs:
            self.eval_loss = float(logs["eval_loss"])
        if "loss" not in logs or not state.is_world_process_zero:
            return
        rate = self.tokens / max(self.training_s, 1e-9)
        left = (state.max_steps - state.global_step) * self.training_s / max(state.global_step, 1)
        self.show(
            StepProgress(
                step=state.global_step,
                steps=state.max_steps,
                loss=float(logs["loss"]),
                learning_rate=float(logs.get("learning_rate", 0.0)),
                tokens_per_s=rate,
                memory_bytes=memory_in_use(),
                eta_s=left,
                eval_loss=self.eval_loss,
            )
        )


def memory_in_use() -> int:
    """Peak bytes: reserved on the card where there is one, else resident in this process."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_reserved())
    scale = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is bytes on macOS, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
