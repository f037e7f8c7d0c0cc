"""What can be said of the rows only together: copies, contradictions, imbalance, mixed templates, oddities."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lorafit.data.codes import CODES
from lorafit.data.excerpt import excerpt
from lorafit.data.groups import first_with, group_of
from lorafit.data.ledger import STYLES_APART
from lorafit.data.rows import Rows
from lorafit.data.store_writer import Stored
from lorafit.data.tally import EXAMPLES, Tally
from lorafit.findings import Finding, Severity

COMMON_ANSWER_SHARE = 0.05
COMMON_ANSWER_ROWS = 20
LABEL_SHARE = 0.05
FEW_LABELS = 10
MIXED_SHARE = 0.01

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class WholeSet:
    """The gathered rows, which of them are held out (n,), and `--holdout`: a share, or a file that holds those."""

    stored: Stored
    held: Mask
    holdout: float | str

    @cached_property
    def rows(self) -> Rows:
        """All rows, of both sides."""
        return Rows(self.stored.rows)

    @property
    def held_by_file(self) -> bool:
        """Whether the held-out rows come from a file of their own."""
        return isinstance(self.holdout, str)

    @property
    def exact_copies(self) -> Mask:
        """True (n,) for rows that repeat an earlier row to the letter."""
        return np.asarray(first_with(self.stored.exact) != np.arange(len(self.held)))

    @property
    def near_copies(self) -> Mask:
        """True (n,) for rows that nearly repeat an earlier row."""
        own = np.arange(len(self.held))
        return np.asarray((self.stored.leader != own) & ~self.exact_copies)

    def findings(self) -> list[Finding]:
        """Every finding that needs all rows."""
        tally = Tally()
        self._copies(tally)
        self._sides(tally)
        self._contradictions(tally)
        found = [tally.finding(code, Severity.WARNING) for code in sorted(tally.seen)]
        return found + self._common_answer() + self._mixed() + self._oddities() + self._empty_sides()

    def _copies(self, tally: Tally) -> None:
        first, leader = first_with(self.stored.exact), self.stored.leader
        self._note(tally, "D030", self.exact_copies, lambda row: f"of {self.rows.source(int(first[row]))}")
        self._note(tally, "D031", self.near_copies, lambda row: f"of {self.rows.source(int(leader[row]))}")

    def _sides(self, tally: Tally) -> None:
        """Held-out rows that a training row nearly repeats; only a held-out file can bring such."""
        if not self.held_by_file:
            return
        group = group_of(self.stored, same_questions=False)
        trained = np.full(len(group), -1)
        rows = np.flatnonzero(~self.held)[::-1]
        trained[group[rows]] = rows
        leaks = self.held & (trained[group] >= 0)
        self._note(tally, "D032", leaks, lambda row: f"of {self.rows.source(int(trained[group[row]]))}")

    def _contradictions(self, tally: Tally) -> None:
        first = first_with(self.stored.question)
        other = self.stored.answer != self.stored.answer[first]
        self._note(tally, "D033", other, lambda row: f"{self.rows.source(int(first[row]))} asks the same")

    def _note(self, tally: Tally, code: str, seen: Mask, tell: Callable[[int], str]) -> None:
        places = np.flatnonzero(seen)
        tally.add_all(code, len(places), [(self.rows.source(row), tell(row)) for row in places[:EXAMPLES].tolist()])

    def _common_answer(self) -> list[Finding]:
        answers, first, counts = np.unique(self.stored.answer, return_index=True, return_counts=True)
        count = len(self.stored.answer)
        if not count or counts.max() < max(COMMON_ANSWER_ROWS, COMMON_ANSWER_SHARE * count):
            return []
        most = int(counts.argmax())
        labels = len(answers) <= max(FEW_LABELS, LABEL_SHARE * count)
        text = excerpt(self.rows.record(int(first[most])).response.strip())
        message = f"{counts[most] / count:.0%} of the rows answer “{text}”"
        if labels:
            message += f"; with {len(answers):,} different answers in {count:,} rows they look like labels"
        severity = Severity.INFO if labels else Severity.WARNING
        place = self.rows.source(int(first[most]))
        return [_finding("D034", severity, message, place, int(counts[most]))]

    def _mixed(self) -> list[Finding]:
        """P5: rows of more than one template style, plain rows being one."""
        styles: dict[str, list[Any]] = self.stored.facts["markers"]
        count = self.stored.facts["counts"]["kept"]
        plain = count - sum(rows for rows, _ in styles.values())
        parties = [rows for rows, _ in styles.values()] + ([plain] if plain else [])
        if not styles or (len(parties) == 1 and STYLES_APART not in next(iter(styles))):
            return []
        strays = sum(parties) - max(parties)
        parts = [f"{style} in {rows:,}" for style, (rows, _) in sorted(styles.items(), key=lambda item: -item[1][0])]
        message = f"mixed instruction templates: of {count:,} rows {', '.join(parts)}, no marker in {plain:,}"
        severity = Severity.ERROR if strays > max(1.0, MIXED_SHARE * count) else Severity.WARNING
        places = tuple(place for _, place in styles.values())[:EXAMPLES]
        return [_finding("P5", severity, message, places[0], count - plain, places)]

    def _oddities(self) -> list[Finding]:
        seen = self.stored.facts["oddities"]
        found = []
        for name, oddities in seen.items():
            parts = [f"{count:,} × {what}" if count > 1 else what for what, count in oddities.items()]
            found.append(
                _finding("D009", Severity.INFO, f"read past: {', '.join(parts)}", name, sum(oddities.values()))
            )
        return found

    def _empty_sides(self) -> list[Finding]:
        name = self.stored.facts["names"][0]
        if self.held.all():
            return [_finding("D035", Severity.ERROR, CODES["D035"].title, name, 1)]
        if self.holdout and not self.held.any():
            return [_finding("D036", Severity.WARNING, CODES["D036"].title, name, 1)]
        return []


def _finding(
    code: str, severity: Severity, message: str, where: str, count: int, places: tuple[str, ...] = ()
) -> Finding:
    rule = CODES[code]
    return Finding(code, severity, message, where, rule.why, rule.fix, count, places or (where,))
