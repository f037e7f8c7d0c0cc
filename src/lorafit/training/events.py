"""EventLog: what happened to a run besides its steps, one JSON line each in events.jsonl."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorafit.training.line_file import LineFile


@dataclass(frozen=True, slots=True)
class RunEvent:
    """`kind` (non_finite, spike, rollback, left_out, out_of_memory, …), the step, one sentence, and its details."""

    kind: str
    step: int
    message: str
    details: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready mapping; numbers that are not finite become null, since JSON has no NaN."""
        return {
            "step": self.step,
            "kind": self.kind,
            "message": self.message,
            **{key: _finite(value) for key, value in self.details.items()},
        }


class EventLog:
    """Appends events to `path` as they happen, keeps them, and passes each to `show`.

    `is_new` for a run that begins: whatever an earlier one left in the file is not its own.
    """

    def __init__(
        self, path: Path | None = None, show: Callable[[RunEvent], None] | None = None, *, is_new: bool = False
    ) -> None:
        self.path, self.show = path, show
        self.seen: list[RunEvent] = []
        self.lines: list[str] = []  # of this process
        self.file = LineFile(path) if path is not None else None
        if self.file is not None and is_new:
            self.file.discard()
        elif self.file is not None:
            self.file.continue_file()

    def record(self, kind: str, step: int, message: str, **details: Any) -> RunEvent:
        """Write the event down and return it; `details` are JSON values."""
        event = RunEvent(kind, step, message, details)
        self.seen.append(event)
        if self.file is not None:
            line = {**event.to_dict(), "unix_s": round(time.time(), 3)}
            self.lines.append(json.dumps(line, ensure_ascii=False) + "\n")
            self._write(self.file)
        if self.show is not None:
            self.show(event)
        return event

    def _write(self, file: LineFile) -> None:
        """Add the newest line; all of this process, where somebody removed the file."""
        if file.path.exists():
            file.append(self.lines[-1])
        else:
            file.begin(self.lines)


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
