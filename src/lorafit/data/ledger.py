"""Ledger: what became of every row, and what was seen on the way."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import IO, Any

from lorafit.data.judgements import Judgement, marker_styles
from lorafit.data.raw_rows import RawRow
from lorafit.data.records import Record
from lorafit.data.rejects import Reject, rejected_line
from lorafit.data.tally import Tally

STYLES_APART = " and "


@dataclass
class Counts:
    """Rows by what became of them: `read = kept + rejected + dropped`; of the kept ones `split` were cut at turns."""

    read: int = 0
    kept: int = 0
    rejected: int = 0
    dropped: int = 0
    split: int = 0


@dataclass
class Ledger:
    """Counts and tallies; rejected and dropped rows are written to `rejected`. `names` are the files' names.

    `markers` holds, for each set of template styles that share a row, how many rows do and where the first stands.
    """

    names: Sequence[str]
    rejected: IO[bytes]
    counts: Counts = field(default_factory=Counts)
    tally: Tally = field(default_factory=Tally)
    markers: dict[str, list[Any]] = field(default_factory=dict)

    def reject(self, row: RawRow, reject: Reject, *, dropped: bool = False) -> None:
        """Count a row that will not be trained on, and keep it with the reason."""
        if dropped:
            self.counts.dropped += 1
        else:
            self.counts.rejected += 1
        place = reject.place(self.names[row.file], row.line)
        near = f" near “{reject.excerpt}”" if reject.excerpt else ""
        self.tally.add(reject.code, place, reject.reason + near)
        raw = row.raw or json.dumps(row.fields, default=str).encode()
        self.rejected.write(rejected_line(place, reject, raw))

    def note(self, record: Record, judgements: Sequence[Judgement]) -> None:
        """Count what was seen in a row that is kept."""
        for code, seen in judgements:
            self.tally.add(code, record.source, seen)
            if code == "D040":
                entry = self.markers.setdefault(STYLES_APART.join(marker_styles(record)), [0, record.source])
                entry[0] += 1

    def facts(self) -> dict[str, Any]:
        """Everything but the rejected rows, JSON-ready."""
        return {"counts": asdict(self.counts), "tally": self.tally.to_dict(), "markers": self.markers}
