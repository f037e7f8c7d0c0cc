"""Tally: how often each code was seen and where first; it becomes one Finding per code."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from lorafit.data.codes import CODES
from lorafit.findings import Finding, Severity

EXAMPLES = 5


@dataclass
class Seen:
    """One code's count, its first places, and what was seen at the first."""

    count: int = 0
    places: list[str] = field(default_factory=list)
    detail: str = ""


@dataclass
class Tally:
    """Counts by code."""

    seen: dict[str, Seen] = field(default_factory=dict)

    def add(self, code: str, place: str, detail: str = "") -> None:
        """Count one sighting."""
        self.add_all(code, 1, [(place, detail)])

    def add_all(self, code: str, count: int, first: Sequence[tuple[str, str]]) -> None:
        """Count `count` sightings, of which `first` holds the first few places and what was seen there."""
        if not count:
            return
        entry = self.seen.setdefault(code, Seen(detail=first[0][1]))
        entry.count += count
        entry.places += [place for place, _ in first[: EXAMPLES - len(entry.places)]]

    def finding(self, code: str, severity: Severity, unit: str = "row") -> Finding:
        """The finding for `code`, which has been seen."""
        entry, rule = self.seen[code], CODES[code]
        plural = "" if entry.count == 1 else "s"
        message = f"{rule.title} in {entry.count:,} {unit}{plural}"
        if entry.detail:
            message += f": {entry.detail}" if entry.count == 1 else f"; the first: {entry.detail}"
        return Finding(code, severity, message, entry.places[0], rule.why, rule.fix, entry.count, tuple(entry.places))

    def findings(self, strict: Iterable[str]) -> list[Finding]:
        """One finding per code seen; codes in `strict` are errors, the others warnings."""
        errors = set(strict)
        return [
            self.finding(code, Severity.ERROR if code in errors else Severity.WARNING) for code in sorted(self.seen)
        ]

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready mapping; `from_dict` is its inverse."""
        return {code: [entry.count, entry.places, entry.detail] for code, entry in self.seen.items()}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Tally:
        """The tally that `to_dict` wrote."""
        return cls({code: Seen(*entry) for code, entry in fields.items()})
