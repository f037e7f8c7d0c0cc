"""fix_rows: write data files again with mechanical faults mended. Faults that need judgement are left."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lorafit.config import NewFiles, RunConfig, parse_bytes
from lorafit.data.checks.findings import CODES
from lorafit.data.checks.rows import CONTROL_BYTES, text_checks
from lorafit.data.dedup import hash64
from lorafit.data.gather import ignored_codes
from lorafit.data.schema.detection import detect
from lorafit.data.schema.shapes import ANSWERS, Shape, renamed
from lorafit.data.sources.discovery import UNREAD, find_files
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
        """Return the changes as a sentence."""
        counts = {
            "rows trimmed": self.trimmed,
            "with line ends mended": self.newlines,
            "without control characters": self.controls,
            "exact copies left out": self.duplicates,
            "unusable rows set aside": self.rejected,
        }
        odd = {f"× {what}": count for what, count in self.file_warnings.items()}
        return ", ".join(f"{count:,} {what}" for what, count in (odd | counts).items() if count) or "nothing"

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready mapping."""
        return asdict(self)


def fix_rows(config: RunConfig, out: Path) -> FixReport:
    """Write the rows of `config.data` to `out` as clean JSONL.

    Blanks at the end of texts are removed, line ends made `\\n`, control characters removed, exact copies left out,
    and fields renamed as `config.field_map` says; every other field stays as it is. Rows that cannot be read, or that
    `check` would reject without a base, go to `out` + `.rejected.jsonl`. Raises DataError when one of the two is there
    already, is an input or cannot be written.
    """
    files = find_files(config.data, encoding=config.encoding)
    files = [file for file in files if file.split != UNREAD]
    if splits := {file.split for file in files if file.split} - {"train"}:
        what = f"the data hold files for {' and '.join(sorted(splits))}, which are not to be mixed into one"
        raise DataError(what, where=config.data[0], fix="name one file after the other, each with an OUT of its own")
    report, reader = FixReport(str(out)), RowReader(files, parse_bytes(config.max_unpacked))
    rejected = out.with_name(out.name + ".rejected.jsonl")
    with NewFiles([out, rejected], inputs=[file.path for file in files], error=DataError) as new:
        clean, refused = new.streams
        rows = _Rows(config, report, files[0].name)
        for row in reader:
            report.read += 1
            line = rows.fixed(row)
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


class _Rows:
    """Mend row after row. The first readable row decides the shape."""

    def __init__(self, config: RunConfig, report: FixReport, name: str) -> None:
        self.config, self.report, self.name = config, report, name
        self.ignored = ignored_codes(config)
        self.seen: set[int] = set()
        self.shape: Shape | None = None

    def fixed(self, row: RawRow) -> bytes | Reject:
        """Return the row's new line (empty for a copy), or the reason why it cannot be used."""
        fields, had_controls = _readable(row)
        if isinstance(fields, Reject):
            return fields
        changes = _Changes()
        mended = changes.fixed(self._renamed(fields))
        if fault := self._fault(mended):
            return fault
        try:
            line = json.dumps(mended, ensure_ascii=False, default=str).encode() + b"\n"
        except UnicodeEncodeError:
            return Reject("D043", "holds half a surrogate pair")
        key = hash64(line)
        if key in self.seen:
            self.report.duplicates += 1
            return b""
        self.seen.add(key)
        self.report.trimmed += changes.trimmed
        self.report.newlines += changes.newlines
        self.report.controls += changes.controls or had_controls
        return line

    def _renamed(self, fields: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the row under lorafit's names.

        If its answer was chosen among several, the other columns are left out.
        """
        row = renamed(fields, self.config.field_map)
        chosen = set(ANSWERS) & set(self.config.field_map)
        return {name: value for name, value in row.items() if name in chosen or name not in ANSWERS} if chosen else row

    def _fault(self, fields: Mapping[str, Any]) -> Reject | None:
        """Return the reason why `check` would reject the mended row, if any."""
        if self.shape is None:
            self.shape = detect([fields], {name: name for name in self.config.field_map if name in fields}, self.name)
        record = self.shape.record(fields, self.name)
        if isinstance(record, Reject):
            return record
        seen = [*text_checks(record)]
        if lost := self.shape.lost(fields, record):
            seen.append(("D038", lost))
        return next((Reject(*one) for one in seen if CODES[one[0]].rejects and one[0] not in self.ignored), None)


def _readable(row: RawRow) -> tuple[Mapping[str, Any] | Reject, bool]:
    """Return (the row's fields, True if control characters were removed to read them)."""
    if row.fields is not None:
        return row.fields, False
    assert row.reject is not None, "a row without fields says why"
    if row.reject.code != "D005":
        return row.reject, False
    parsed = parse_row(row.raw.translate(None, CONTROL_BYTES))
    return (row.reject if isinstance(parsed, Reject) else parsed), True


class _Changes:
    """Mend one row and count each kind of change."""

    def __init__(self) -> None:
        self.trimmed = self.newlines = self.controls = False

    def fixed(self, value: Any) -> Any:
        """Return `value` with every text in it mended."""
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
        stripped = text.rstrip()  # blanks on the left may be the indentation of code
        self.trimmed = self.trimmed or stripped != text
        return stripped
