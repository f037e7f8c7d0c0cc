"""The console: one for people (rich, on stdout), one for errors (stderr), and JSON for machines."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import IO, Any, TextIO, cast

from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from lorafit.findings import Finding, Severity

PIPE_WIDTH = 120
PEOPLE = Console(highlight=False)
if not PEOPLE.is_terminal:
    PEOPLE.width = PIPE_WIDTH  # a log has no edge to wrap at
ERRORS = Console(stderr=True, highlight=False)
GONE = (errno.EPIPE, errno.EIO, errno.EBADF)
"""What a reader or a terminal that is gone answers: nobody will ever read more."""
COLOURS = {Severity.ERROR: "bold red", Severity.WARNING: "yellow", Severity.INFO: "cyan"}


class _Steady:
    """A text stream that drops what cannot be written: to a reader or a terminal that is gone, and on a full disk.

    With `always` false a full disk is an error, as ever.
    """

    def __init__(self, stream: IO[str], *, always: bool = True) -> None:
        self.stream, self.always = stream, always

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except OSError as error:
            self._forget(error)
        return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except OSError as error:
            self._forget(error)

    def close(self) -> None:
        """The last try: Python's own, when it ends, would make exit code 120 of a failure."""
        try:
            self.stream.flush()
        except OSError as error:
            self._leave()
            self._forget(error)

    def _forget(self, error: OSError) -> None:
        if error.errno in GONE:
            self._leave()
        elif not self.always:
            raise error

    def _leave(self) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.stream.fileno())
        os.close(nowhere)


@contextlib.contextmanager
def steady(console: Console = PEOPLE) -> Iterator[None]:
    """Within it no work ends because its output cannot be written."""
    if sys.stdout is None or sys.stderr is None:
        yield  # closed from the beginning: rich knows that
        return
    stream = _Steady(console.file)
    console.file = cast(IO[str], stream)
    try:
        yield
    finally:
        stream.close()
        console.file = cast(IO[str], None)  # whatever sys.stdout is then


@contextlib.contextmanager
def piped() -> Iterator[None]:
    """Within it a reader of stdout that goes away (`lorafit check … | head`) ends nothing: the exit code still holds.

    Of rich, click and Python itself each makes another exit code of it.
    """
    stdout = sys.stdout
    if stdout is None:
        yield  # closed from the beginning
        return
    stream = _Steady(stdout, always=False)
    sys.stdout = cast(TextIO, stream)
    try:
        yield
    finally:
        sys.stdout = stdout
        stream.close()


def say(line: str = "") -> None:
    """One line of rich markup; where it is longer than the screen is wide, it goes on as far in as it began."""
    text = line.lstrip(" ")
    indent = len(line) - len(text)
    PEOPLE.print(Padding(text, (0, 0, 0, indent), expand=False) if indent else text)


def heading(title: str, detail: str = "") -> None:
    """A stage of the work: a bold title and what it did."""
    PEOPLE.print(f"[bold]{title:<9}[/bold] {detail}")


def counted(count: int, noun: str) -> str:
    """`1 step`, `1,200 steps`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def show_error(sentence: str, label: str = "error") -> None:
    """One sentence on stderr, where there is somebody to read it: the exit code holds without."""
    colour = "bold red" if label == "error" else "bold yellow"
    with steady(ERRORS):
        ERRORS.print(Text.assemble((f"{label}: ", colour), sentence), soft_wrap=True)


def show_json(content: Any) -> None:
    """One JSON object on stdout. NaN is null: JSON has no other word for it."""
    print(json.dumps(_finite(content), indent=1, ensure_ascii=False))


def _finite(content: Any) -> Any:
    if isinstance(content, float) and not math.isfinite(content):
        return None
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return content


def show_findings(findings: Sequence[Finding]) -> None:
    """Each finding: code, where, what was seen; why and the fix below it."""
    for finding in findings:
        colour = COLOURS[finding.severity]
        times = f" ×{finding.count:,}" if finding.count > 1 else ""
        place = f" [dim]{escape(finding.where)}[/dim]" if finding.where else ""
        say(f"  [{colour}]{finding.code:<5}{finding.severity.value}[/{colour}]{times}{place} {escape(finding.message)}")
        if others := finding.examples[1:]:
            more = ", …" if finding.count > len(finding.examples) else ""
            _note(f"[dim]also[/dim] {escape(', '.join(others))}{more}")
        if finding.why:
            _note(f"[dim]why[/dim] {escape(finding.why)}")
        if finding.fix:
            _note(f"[dim]fix[/dim] {escape(finding.fix)}")


def _note(markup: str) -> None:
    PEOPLE.print(Padding(markup, (0, 0, 0, 8)))


def show_settings(rows: Iterable[tuple[str, Any, str]]) -> None:
    """Every setting, its value and who set it: a table of what somebody set, a paragraph of the defaults."""
    given, defaults = Table.grid(padding=(0, 2)), []
    for key, value, source in rows:
        if source == "default":
            defaults.append(f"{key} {_shown(value)}")
        else:
            given.add_row(key, Text(_shown(value), style="bold"), Text(source, style="dim"))
    for column in given.columns:
        column.overflow = "fold"  # a path is one long word
    PEOPLE.print(Padding(given, (0, 0, 0, 2)))
    PEOPLE.print(Padding(Text(f"default: {' · '.join(defaults)}", style="dim"), (0, 0, 0, 2)))


def _shown(value: Any) -> str:
    if value is None or value == () or value == {}:
        return "–"
    return ", ".join(str(one) for one in value) if isinstance(value, tuple) else str(value)


def loss(value: float) -> str:
    """A loss as people read it; NaN is called NaN."""
    return "NaN" if math.isnan(value) else f"{value:.4f}"


def gib(size_bytes: float) -> str:
    """Bytes as people read them."""
    from lorafit.config.units import size_in_words  # pydantic stays out of --help

    return size_in_words(size_bytes)


def duration(seconds: float) -> str:
    """Seconds as people read them."""
    if not math.isfinite(seconds):
        return "?"
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"
