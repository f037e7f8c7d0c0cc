"""findings_view: the display of findings, each with reason and fix, or one line each."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rich.markup import escape
from rich.padding import Padding
from rich.text import Text

from lorafit.cli.screen.console import PEOPLE, counted, near, say, typed
from lorafit.findings import Finding, Severity

COLOURS = {Severity.ERROR: "bold red", Severity.WARNING: "yellow", Severity.INFO: "cyan"}
NAMES = {Severity.INFO: "note"}
ORDER = (Severity.ERROR, Severity.WARNING, Severity.INFO)
PLACE = re.compile(r"(.+?):(\d+(?::\d+)?)")


def show_findings(findings: Sequence[Finding], data: Sequence[str] = ()) -> None:
    """Show each finding: code, place and message, with the reason and the fix below.

    `data` are the files, and the flags that say how to read them, as typed, for commands in the fixes.
    """
    for finding in findings:
        place = f" [dim]{escape(near(finding.where))}[/dim]" if finding.where else ""
        say(f"  {_head(finding)}{place} {escape(near(finding.message))}")
        if finding.examples[1:]:
            _note(f"[dim]also[/dim] {escape(_further(finding))}")
        if finding.why:
            _note(f"[dim]why[/dim] {escape(finding.why)}")
        if finding.fix:
            _note(f"[dim]fix[/dim] {escape(with_names(finding.fix, data))}")


def show_short_findings(findings: Sequence[Finding], most: int) -> None:
    """Show one line a finding, the worst first.

    At most `most` are shown, then the number left out.
    """
    ranked = sorted(findings, key=lambda finding: ORDER.index(finding.severity))
    shown = [finding for finding in ranked if finding.severity is not Severity.INFO][:most]
    for finding in shown:
        place = f"{near(finding.where)} " if finding.where else ""
        line = Text.from_markup(f"  {_head(finding)} {escape(place)}{escape(near(finding.message))}")
        line.truncate(PEOPLE.width, overflow="ellipsis")
        PEOPLE.print(line)
    if left := len(ranked) - len(shown):
        more = "more finding" if shown else "note"
        say(f"  [dim]{counted(left, more)} behind --explain[/dim]")


def with_names(fix: str, data: Sequence[str]) -> str:
    """Return `fix` with the user's own files in its commands."""
    if not data:
        return near(fix)
    return near(fix).replace("lorafit check --fix", f"lorafit check {typed(*data)} --fix clean.jsonl")


def _head(finding: Finding) -> str:
    colour, name = COLOURS[finding.severity], NAMES.get(finding.severity, finding.severity.value)
    times = f" ×{finding.count:,}" if finding.count > 1 else ""
    return f"[{colour}]{finding.code:<5}{name}[/{colour}]{times}"


def _further(finding: Finding) -> str:
    """Return the places after the first; in the same file only line numbers."""
    first = PLACE.fullmatch(finding.examples[0])
    places = []
    for example in finding.examples[1:]:
        at = PLACE.fullmatch(example)
        places.append(at[2] if at and first and at[1] == first[1] else near(example))
    return ", ".join(places) + (", …" if finding.count > len(finding.examples) else "")


def _note(markup: str) -> None:
    PEOPLE.print(Padding(markup, (0, 0, 0, 8), expand=False))
