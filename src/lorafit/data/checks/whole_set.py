"""Checks of all rows together (copies, contradictions, imbalance, mixed templates), and the held-out split."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lorafit.data.checks.findings import CODES, EXAMPLES, STYLES_APART, FindingCounts
from lorafit.data.dedup import duplicates_of, leaders, mixed
from lorafit.data.schema.records import CALLS, REASONING
from lorafit.data.sources.raw_row import excerpt
from lorafit.data.store import Rows, Stored
from lorafit.findings import Finding, Severity
from lorafit.runs import new_own

COMMON_QUESTION_SHARE = 0.05
Numbers = NDArray[np.int64]


def first_with(keys: NDArray[np.uint64]) -> Numbers:
    """Return (n,): for each row the first row with the same key."""
    return duplicates_of(keys)[1]


def group_of(stored: Stored, *, same_questions: bool = True) -> Numbers:
    """Return (n,): for each row the first row of its group.

    A group holds near copies, rows that are the same but for case and blanks, pieces of one conversation and, with
    `same_questions`, rows with one prompt, unless more than 5 % of all rows have that prompt.
    """
    own = np.arange(len(stored.exact))
    same_text = mixed(stored.question) ^ stored.answer
    ties = [stored.leader, first_with(same_text), first_with(stored.row.astype(np.uint64))]
    if same_questions:
        ties.append(_first_with_question(stored.question, own))
    return leaders(len(own), np.tile(own, len(ties)), np.concatenate(ties))


def _first_with_question(question: NDArray[np.uint64], own: Numbers) -> Numbers:
    _, first, place, counts = np.unique(question, return_index=True, return_inverse=True, return_counts=True)
    rare = counts <= max(1.0, COMMON_QUESTION_SHARE * len(question))
    return np.where(rare[place], first[place], own)


ROWS_TO_HOLD_OUT_FROM = 20


def held_out(groups: NDArray[np.int64], content: NDArray[np.uint64], share: float, seed: int) -> NDArray[np.bool_]:
    """Return a mask (n,): True for held-out rows.

    `groups` (n,) names each row's group by its first row, `content` (n,) is a hash of each row. A group's side
    follows from the seed and the hash of its first row, not from its place: rows appended later move nobody,
    unless they join two groups. A group larger than the whole held-out share stays in training. From 20 rows
    on each side has a row, when there are two groups; then the group with the least draw is held out.
    """
    count = len(groups)
    if share <= 0 or count < 2:
        return np.zeros(count, np.bool_)
    first, group, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    draw = _draw(content[first], seed)
    too_large = sizes > max(1.0, share * count)
    held = (draw < share) & ~too_large
    if len(first) > 1 and (held.all() or (count >= ROWS_TO_HOLD_OUT_FROM and not held.any())):
        held = np.arange(len(first)) == np.lexsort((draw, np.where(too_large, sizes, 0)))[0]
    return np.asarray(held[group], np.bool_)


def _draw(content: NDArray[np.uint64], seed: int) -> NDArray[np.float64]:
    """Return numbers in [0, 1), one for each group."""
    return mixed(content ^ mixed(np.array([seed], np.uint64))).astype(np.float64) / 2.0**64


def write_split(path: Path, train: Rows, holdout: Rows) -> None:
    """Write the side and place of each row to `split.tsv` of the run directory, in the order of the files."""
    with os.fdopen(new_own(path), "w", encoding="utf-8") as stream:
        stream.write("side\tsource\n")
        for side, rows in (("train", train), ("holdout", holdout)):
            stream.writelines(f"{side}\t{source}\n" for source in rows.sources())


COMMON_ANSWER_SHARE = 0.05
COMMON_ANSWER_ROWS = 20
LABEL_SHARE = 0.05
FEW_LABELS = 10
MIXED_SHARE = 0.01

MOST_NAMES = 12
KNOWN_TURN_FIELDS = (REASONING, CALLS, "tool_call_id", "id")

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class WholeSet:
    """The gathered rows, the held-out mask (n,), `--holdout`, and whether held-out rows have files of their own."""

    stored: Stored
    held: Mask
    holdout: float | str
    held_by_file: bool = False

    @cached_property
    def rows(self) -> Rows:
        """All rows, of both sides."""
        return Rows(self.stored.rows)

    @property
    def exact_copies(self) -> Mask:
        """Return a mask (n,): True for rows equal to an earlier row."""
        return np.asarray(first_with(self.stored.exact) != np.arange(len(self.held)))

    @property
    def near_copies(self) -> Mask:
        """Return a mask (n,): True for rows nearly equal to an earlier row."""
        own = np.arange(len(self.held))
        # examples of one row share its beginning
        apart = self.stored.row[self.stored.leader] != self.stored.row
        return np.asarray((self.stored.leader != own) & apart & ~self.exact_copies)

    def findings(self) -> list[Finding]:
        """Return every finding that needs all rows."""
        finding_counts = FindingCounts()
        self._copies(finding_counts)
        self._sides(finding_counts)
        self._contradictions(finding_counts)
        found = [finding_counts.finding(code, Severity.WARNING) for code in sorted(finding_counts.seen)]
        found += self._common_answer() + self._mixed() + self._file_warnings() + self._empty_sides()
        return found + self._unused() + self._one_system()

    def _copies(self, finding_counts: FindingCounts) -> None:
        first, leader = first_with(self.stored.exact), self.stored.leader
        self._note(finding_counts, "D030", self.exact_copies, lambda row: f"of {self.rows.source(int(first[row]))}")
        self._note(finding_counts, "D031", self.near_copies, lambda row: f"of {self.rows.source(int(leader[row]))}")

    def _sides(self, finding_counts: FindingCounts) -> None:
        """Count held-out rows nearly equal to a training row. Only a held-out file can bring such."""
        if not self.held_by_file:
            return
        group = group_of(self.stored, same_questions=False)
        trained = np.full(len(group), -1)
        rows = np.flatnonzero(~self.held)[::-1]
        trained[group[rows]] = rows
        leaks = self.held & (trained[group] >= 0)
        self._note(finding_counts, "D032", leaks, lambda row: f"of {self.rows.source(int(trained[group[row]]))}")

    def _contradictions(self, finding_counts: FindingCounts) -> None:
        first = first_with(self.stored.question)
        other = self.stored.answer != self.stored.answer[first]
        self._note(finding_counts, "D033", other, lambda row: f"{self.rows.source(int(first[row]))} asks the same")

    def _note(self, finding_counts: FindingCounts, code: str, seen: Mask, tell: Callable[[int], str]) -> None:
        places = np.flatnonzero(seen)
        finding_counts.add_all(
            code, len(places), [(self.rows.source(row), tell(row)) for row in places[:EXAMPLES].tolist()]
        )

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
        """Return P5 if rows have more than one template style, plain rows being one."""
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

    def _file_warnings(self) -> list[Finding]:
        seen = self.stored.facts["file_warnings"]
        found = []
        for name, file_warnings in seen.items():
            parts = [f"{count:,} × {what}" if count > 1 else what for what, count in file_warnings.items()]
            found.append(
                _finding("D009", Severity.INFO, f"unusual bytes: {', '.join(parts)}", name, sum(file_warnings.values()))
            )
        return found

    def _unused(self) -> list[Finding]:
        """Return findings on columns, and fields of turns, that nothing reads."""
        facts = self.stored.facts
        turns = [f"{name} (of a turn)" for name in facts["turn_fields"] if name not in KNOWN_TURN_FIELDS]
        names = [*(excerpt(str(name), 30) or "one without a name" for name in facts["unused"]), *turns]
        if not names:
            return []
        also = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
        message = f"columns that are not used: {', '.join(names[:MOST_NAMES])}{also}"
        found = _finding("D037", Severity.INFO, message, facts["names"][0], len(names))
        return [replace(found, fix=facts["fix_of_unused"]) if facts["fix_of_unused"] else found]

    def _one_system(self) -> list[Finding]:
        """Return a finding on a system text that all rows share: the model must be served with it."""
        facts = self.stored.facts
        if not facts["system"]:
            return []
        message = f"all rows share one system text: “{excerpt(facts['system'])}”"
        return [_finding("D049", Severity.INFO, message, facts["names"][0], facts["counts"]["kept"])]

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
