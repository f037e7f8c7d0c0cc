"""fix_rows: the file again with the mechanical faults mended; nothing that needs judgement is touched."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lorafit.config import NewFiles, RunConfig, parse_bytes
from lorafit.data.checks.rows import CONTROL_BYTES
from lorafit.data.dedup import hash64
from lorafit.data.sources.files import find_files
from lorafit.data.sources.raw_row import RawRow, Reject, parse_row, rejected_line
from lorafit.data.sources.reader import RowReader
from lorafit.errors import DataError

CONTROLS = re.compile("[" + "".join(f"\\x{code:02x}" for code in CONTROL_BYTES) + "\u0080-\u009f]")


@dataclass
class FixReport:
    """`read = written + duplicates + rejected`; the others count rows changed in that way. `file_warnings` are of the
    files: byte order marks, line ends, blank lines, other encodings."""

    out: str
    read: int = 0
    written: int = 0
    trimmed: int = 0
    newlines: int = 0
    controls: int = 0
    duplicates: int = 0
    rejected: int = 0
    file_warnings: dict[str, int] = field(default_factory=dict)
    rejected_file: str | None = None

    @property
    def changes(self) -> str:
        """What was changed, in words."""
        counts = {
            "rows trimmed": self.trimmed,
            "with line ends mended": self.newlines,
            "without control characters": self.controls,
            "exact copies left out": self.duplicates,
            "unreadable rows set aside": self.rejected,
        }
        odd = {f"× {what}": count for what, count in self.file_warnings.items()}
        return ", ".join(f"{count:,} {what}" for what, count in (odd | counts).items() if count) or "nothing"

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready mapping."""
        return asdict(self)


def fix_rows(config: RunConfig, out: Path) -> FixReport:
    """Write the rows of `config.data` to `out` as clean JSONL.

    Fields that `field_map` names get our names. Texts are trimmed, line ends made `\\n`, control characters removed,
    exact copies left out; every other field stays as it is. Rows that cannot be read go to `out` + `.rejected.jsonl`.
    Raises DataError when one of the two is there already, is an input or cannot be written.
    """
    files = find_files(config.data)
    report, reader = FixReport(str(out)), RowReader(files, parse_bytes(config.max_unpacked))
    rejected = out.with_name(out.name + ".rejected.jsonl")
    with NewFiles([out, rejected], inputs=[file.path for file in files], error=DataError) as new:
        clean, refused = new.streams
        seen: set[int] = set()
        for row in reader:
            report.read += 1
            line = _fixed_line(row, seen, report, config.field_map)
            if isinstance(line, Reject):
                report.rejected += 1
                refused.write(rejected_line(line.place(files[row.file].name, row.line), line, row.raw))
            elif line:
                report.written += 1
                clean.write(line)
        if not report.rejected:
            new.leave_out(rejected)
    report.file_warnings = dict(sum(reader.file_warnings.values(), Counter()))
    report.rejected_file = str(rejected) if report.rejected else None
    return report


def _fixed_line(row: RawRow, seen: set[int], report: FixReport, mapped: Mapping[str, str]) -> bytes | Reject:
    """The row's new line, empty when it is a copy, or why it cannot be read."""
    fields, had_controls = row.fields, False
    if fields is None and row.reject is not None and row.reject.code == "D005":
        parsed = parse_row(row.raw.translate(None, CONTROL_BYTES))
        fields, had_controls = (None if isinstance(parsed, Reject) else parsed), True
    if fields is None:
        assert row.reject is not None
        return row.reject
    ours = {theirs: name for name, theirs in mapped.items()}
    fields = {ours.get(name, name): value for name, value in fields.items()}
    changes = _Changes()
    text = json.dumps(changes.fixed(fields), ensure_ascii=False, default=str)
    try:
        line = text.encode() + b"\n"
    except UnicodeEncodeError:
        return Reject("D043", "holds half a surrogate pair")
    key = hash64(line)
    if key in seen:
        report.duplicates += 1
        return b""
    seen.add(key)
    report.trimmed += changes.trimmed
    report.newlines += changes.newlines
    report.controls += changes.controls or had_controls
    return line


class _Changes:
    """Mends one row and remembers what it did."""

    def __init__(self) -> None:
        self.trimmed = self.newlines = self.controls = False

    def fixed(self, value: Any) -> Any:
        """`value` with every text in it mended."""
        if isinstance(value, str):
            return self._text(value)
        if isinstance(value, Mapping):
            return {name: self.fixed(cell) for name, cell in value.items()}
        if isinstance(value, list):
            return [self.fixed(cell) for cell in value]
        return value

    def _text(self, text: str) -> str:
        if "\r" in text:
            text, self.newlines = text.replace("\r\n", "\n").replace("\r", "\n"), True
        if CONTROLS.search(text):
            text, self.controls = CONTROLS.sub("", text), True
        stripped = text.strip()
        self.trimmed = self.trimmed or stripped != text
        return stripped
