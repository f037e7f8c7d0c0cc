"""Reject: why one row cannot be trained on, and the file that keeps such rows."""

from __future__ import annotations

import json
from dataclasses import dataclass

RAW_LIMIT_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class Reject:
    """A row that cannot be used: its `code`, what was seen (`reason`), and the 1-based `column` where known.

    `line_offset` counts the line ends between the row's first line and the fault; `excerpt` is the text there.
    """

    code: str
    reason: str
    column: int = 0
    line_offset: int = 0
    excerpt: str = ""

    def place(self, name: str, line: int) -> str:
        """`file:line:column`, or `file:line` when the fault has no column."""
        place = f"{name}:{line + self.line_offset}"
        return f"{place}:{self.column}" if self.column else place


def rejected_line(source: str, reject: Reject, raw: bytes) -> bytes:
    """One line of rejected.jsonl; a raw row longer than 64 KiB is kept up to there and says so."""
    entry = {"source": source, "code": reject.code, "reason": reject.reason}
    entry["raw"] = raw[:RAW_LIMIT_BYTES].decode("utf-8", "backslashreplace")
    if len(raw) > RAW_LIMIT_BYTES:
        entry["raw_bytes"] = str(len(raw))
    return json.dumps(entry, ensure_ascii=True).encode() + b"\n"
