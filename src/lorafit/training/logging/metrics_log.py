"""MetricsLog: one JSON line per step and per evaluation in metrics.jsonl, and nothing that depends on the clock."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorafit.training.logging.events import LineFile
from lorafit.training.optimization import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

KEPT = ("loss", "eval_loss", "grad_norm", "learning_rate")


class MetricsLog(TrainerCallback):
    """metrics.jsonl: {step, epoch, loss, grad_norm, learning_rate | eval_loss}, the same bytes for the same run.

    It is the Trainer's history in lines: a resumed run writes it anew from the history in its checkpoint, so that each
    step is in it once whatever a killed process had added. A disk that refuses a line does not end the run: the lines
    are kept, and written with the next one.

    timings.jsonl, beside it, has {step, elapsed_s} of this process, appended.
    """

    def __init__(self, path: Path) -> None:
        self.file, self.timings = LineFile(path), path.with_name("timings.jsonl")
        self.history: list[dict[str, Any]] = []
        self.started = time.perf_counter()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.started = time.perf_counter()
        if state.is_world_process_zero:
            self.begin(state.log_history)

    def begin(self, history: list[dict[str, Any]]) -> None:
        """Start the file anew with the lines of `history`, which the Trainer goes on writing."""
        self.history = history
        self.file.begin(line for entry in history if (line := line_of(entry)) is not None)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        if not state.is_world_process_zero:
            return
        line = line_of({"epoch": state.epoch, **(given.get("logs") or {}), "step": state.global_step})
        if line is None:
            return
        if self.file.is_whole:
            self.file.append(line)
        else:  # somebody removed it; the Trainer has this entry in its history already
            self.begin(state.log_history)
        self._time(state.global_step)

    def flush(self) -> bool:
        """Write the lines that wait, or all where the file is gone; False when the disk refuses them still."""
        if not self.file.is_whole:
            self.begin(self.history)
        return self.file.flush()

    def _time(self, step: int) -> None:
        line = json.dumps({"step": step, "elapsed_s": round(time.perf_counter() - self.started, 3)}) + "\n"
        try:
            descriptor = os.open(self.timings, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        except OSError:
            return  # timings are not worth a run
        try:
            os.write(descriptor, line.encode())
        except OSError:
            return
        finally:
            os.close(descriptor)


def line_of(entry: Mapping[str, Any]) -> str | None:
    """The line of one entry of the Trainer's history; None for one that is neither a step nor an evaluation."""
    # JSON has no NaN: null is the honest word for it
    kept = {key: entry[key] if math.isfinite(entry[key]) else None for key in KEPT if key in entry}
    if not kept:
        return None
    return json.dumps({"step": entry["step"], "epoch": round(entry.get("epoch") or 0.0, 4), **kept}) + "\n"
