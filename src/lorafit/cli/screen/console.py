"""The console: one for people (rich, on stdout), one for errors (stderr), and JSON for machines."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import re
import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, TextIO, cast

from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text


class _Trimmed:
    """The standard output of the moment; no line ends in blanks where it is no terminal."""

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stdout, name)

    def isatty(self) -> bool:
        return sys.stdout is not None and hasattr(sys.stdout, "isatty") and sys.stdout.isatty()

    def write(self, text: str) -> int:
        if sys.stdout is not None:
            sys.stdout.write(text if self.isatty() else BLANKS.sub("", text))
        return len(text)

    def flush(self) -> None:
        if sys.stdout is not None:
            sys.stdout.flush()


PIPE_WIDTH = 120
BLANKS = re.compile(r"[ \t]+(?=\n)")
OUTPUT = cast(IO[str], _Trimmed())
PEOPLE = Console(file=OUTPUT, highlight=False)
if not PEOPLE.is_terminal and "COLUMNS" not in os.environ:
    PEOPLE.width = PIPE_WIDTH  # a log has no edge to wrap at
ERRORS = Console(stderr=True, highlight=False)
GONE = (errno.EPIPE, errno.EIO, errno.EBADF)
"""What a reader or a terminal that is gone answers: nobody will ever read more."""


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
        console.file = OUTPUT if console is PEOPLE else cast(IO[str], None)  # whatever sys.stderr is then


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
        ERRORS.print(Text.assemble((f"{label}: ", colour), near(sentence)), soft_wrap=True)


def show_json(content: Any) -> None:
    """One JSON object on stdout. NaN is null: JSON has no other word for it."""
    print(json.dumps(without_infinities(content), indent=1, ensure_ascii=False))


def without_infinities(content: Any) -> Any:
    """`content` with null for every number that JSON has no word for."""
    if isinstance(content, float) and not math.isfinite(content):
        return None
    if isinstance(content, dict):
        return {key: without_infinities(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [without_infinities(value) for value in content]
    return content


def show_settings(rows: Iterable[tuple[str, Any, str]], names: Mapping[str, str] | None = None) -> None:
    """Show every setting, its value and who set it: a table of those set, a paragraph of defaults.

    `names`: the name that somebody gave a setting under, where that is another.
    """
    given, defaults = Table.grid(padding=(0, 2)), []
    for key, value, source in rows:
        if source == "default":
            defaults.append(f"{key} {_shown(key, value)}")
        else:
            name = f"{source} ({names[key]})" if names and key in names else source
            given.add_row(key, Text(_shown(key, value), style="bold"), Text(name, style="dim"))
    for column in given.columns:
        column.overflow = "fold"  # a path is one long word
    PEOPLE.print(Padding(given, (0, 0, 0, 2)))
    if defaults:
        PEOPLE.print(Padding(Text(f"default: {' · '.join(defaults)}", style="dim"), (0, 0, 0, 2)))


def _shown(key: str, value: Any) -> str:
    if value is None or value == () or value == {}:
        return "–"
    if key == "gpu_memory" and "gib" not in value.lower():
        from lorafit.config import parse_bytes  # pydantic stays out of --help

        return f"{value} ({gib(parse_bytes(value))})"
    if isinstance(value, dict):
        return ", ".join(f"{ours}={theirs}" for ours, theirs in value.items())
    return near(", ".join(str(one) for one in value) if isinstance(value, tuple) else str(value))


def show_next(*commands: tuple[str, str], title: str = "next") -> None:
    """Show what to type next: (command, purpose) each."""
    for number, (command, purpose) in enumerate(commands):
        head = f"[bold]{title:<9}[/bold]" if number == 0 else " " * 9
        why = f"  [dim]{escape(purpose)}[/dim]" if purpose else ""
        # left to the terminal to wrap: a command is there to be copied
        PEOPLE.print(f"{head} [cyan]{escape(command)}[/cyan]{why}", soft_wrap=True)


def near(text: str) -> str:
    """`text` with the paths in the current folder relative to it."""
    return text.replace(f"{Path.cwd()}{os.sep}", "")


def typed(*words: str) -> str:
    """The words of a command as one types them."""
    return " ".join(near(shlex.quote(near(word))) for word in words)


def loss(value: float) -> str:
    """A loss as people read it; NaN is called NaN."""
    return "NaN" if math.isnan(value) else f"{value:.4f}"


def gib(size_bytes: float) -> str:
    """Bytes as people read them."""
    from lorafit.config.foreign_text import size_in_words  # pydantic stays out of --help

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
