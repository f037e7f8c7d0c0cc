"""MetricsLog: one JSON line per step and per evaluation in metrics.jsonl."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

KEPT = ("loss", "eval_loss", "grad_norm", "learning_rate")


class MetricsLog(TrainerCallback):
    """Appends {step, epoch, loss, grad_norm, learning_rate, tokens_per_s | eval_loss} as training goes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.started = time.perf_counter()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.path.write_text("")
        self.started = time.perf_counter()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        if not state.is_world_process_zero:
            return
        logs = given.get("logs") or {}
        # JSON has no NaN: null is the honest word for it
        kept = {key: logs[key] if math.isfinite(logs[key]) else None for key in KEPT if key in logs}
        if kept:
            elapsed = time.perf_counter() - self.started
            line = {
                "step": state.global_step,
                "epoch": round(state.epoch or 0.0, 4),
                **kept,
                "elapsed_s": round(elapsed, 3),
            }
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
