"""run_logs: events.jsonl and metrics.jsonl, one JSON line for each event or step."""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorafit.runs import append_own, open_own, read_own
from lorafit.training.transformers_parts import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

KEPT = ("loss", "eval_loss", "grad_norm", "learning_rate")


@dataclass(frozen=True, slots=True)
class RunEvent:
    """Hold one event of a run.

    Attributes:
        kind: its kind: non_finite, spike, rollback, left_out, out_of_memory and others.
        step: the step at which it happened.
        message: one sentence.
        details: further JSON values.
    """

    kind: str
    step: int
    message: str
    details: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready mapping. Numbers that are not finite become null, since JSON has no NaN."""
        return {
            "step": self.step,
            "kind": self.kind,
            "message": self.message,
            **{key: _finite(value) for key, value in self.details.items()},
        }


class EventLog:
    """Append events to `path` as they happen, keep them, and pass each to `show`.

    With `is_new` the lines of an earlier run in the file are removed.
    """

    def __init__(
        self, path: Path | None = None, show: Callable[[RunEvent], None] | None = None, *, is_new: bool = False
    ) -> None:
        self.path, self.show = path, show
        self.current_step = 0
        self.seen: list[RunEvent] = []
        self.file = LineFile(path) if path is not None else None
        if self.file is not None and is_new:
            self.file.discard()
        elif self.file is not None:
            self.file.continue_file()

    def at(self, step: int) -> None:
        """Set the step of later calls to `note`."""
        self.current_step = step

    def note(self, kind: str, message: str) -> RunEvent:
        """Record an event of the current step."""
        return self.record(kind, self.current_step, message)

    def record(self, kind: str, step: int, message: str, **details: Any) -> RunEvent:
        """Write the event and return it; `details` are JSON values."""
        event = RunEvent(kind, step, message, details)
        self.seen.append(event)
        if self.file is not None:
            line = {**event.to_dict(), "unix_s": round(time.time(), 3)}
            self.file.append(json.dumps(line, ensure_ascii=False) + "\n")
        if self.show is not None:
            self.show(event)
        return event


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


class LineFile:
    """Append lines to a file, and cut off any half-written or foreign text behind them.

    A process has one LineFile for each file. `begin` replaces the content, `continue_file` keeps its whole lines.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.written_bytes = 0
        self.waiting: list[str] = []

    def begin(self, lines: Iterable[str]) -> None:
        """Restart the file with `lines`, each ending in a newline."""
        self.written_bytes, self.waiting = 0, list(lines)
        self.flush()

    def discard(self) -> None:
        """Remove the file of an earlier process. If that fails, the first line replaces the content."""
        with contextlib.suppress(OSError):
            self.path.unlink(missing_ok=True)

    def continue_file(self) -> None:
        """Continue behind the last whole line of the file."""
        try:
            content = read_own(self.path)
        except OSError:
            content = b""
        self.written_bytes = content.rfind(b"\n") + 1

    def append(self, line: str) -> None:
        """Add a line, which ends in a newline. The line waits while the disk refuses it."""
        self.waiting.append(line)
        self.flush()

    def flush(self) -> bool:
        """Write the waiting lines. Return False if the disk still refuses."""
        if not self.is_whole:
            self.continue_file()  # a removed file must not become a gap of zeros
        text = "".join(self.waiting).encode()
        try:
            with os.fdopen(open_own(self.path, os.O_RDWR | os.O_CREAT), "r+b") as file:
                file.truncate(self.written_bytes)
                file.seek(self.written_bytes)
                file.write(text)
        except OSError:
            return False
        self.written_bytes += len(text)
        self.waiting.clear()
        return True

    @property
    def is_whole(self) -> bool:
        """Return False if written lines are gone from the disk."""
        try:
            return self.path.lstat().st_size >= self.written_bytes
        except OSError:
            return self.written_bytes == 0


class MetricsLog(TrainerCallback):
    """Write metrics.jsonl: {step, epoch, loss, grad_norm, learning_rate | eval_loss}.

    The same run writes the same bytes. The lines are the Trainer's history: a resumed run rewrites them from the
    history in its checkpoint, so that each step appears once, whatever a killed process had added. A disk that refuses
    a line does not end the run: the line is kept and written with the next one.

    timings.jsonl has {step, elapsed_s} of this process, appended.
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
        """Restart the file with the lines of `history`, which the Trainer keeps extending."""
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
        else:  # the file was removed; the Trainer's history already has this entry
            self.begin(state.log_history)
        self._time(state.global_step)

    def flush(self) -> bool:
        """Write the waiting lines, or all if the file is gone. Return False if the disk still refuses."""
        if not self.file.is_whole:
            self.begin(self.history)
        return self.file.flush()

    def _time(self, step: int) -> None:
        line = json.dumps({"step": step, "elapsed_s": round(time.perf_counter() - self.started, 3)}) + "\n"
        with contextlib.suppress(OSError):  # lost timings must not end a run
            append_own(self.timings, line)


def line_of(entry: Mapping[str, Any]) -> str | None:
    """Return the line of a step's or an evaluation's history entry, None for other entries."""
    # null stands for NaN, which JSON does not have
    kept = {key: entry[key] if math.isfinite(entry[key]) else None for key in KEPT if key in entry}
    if not kept:
        return None
    return json.dumps({"step": entry["step"], "epoch": round(entry.get("epoch") or 0.0, 4), **kept}) + "\n"
