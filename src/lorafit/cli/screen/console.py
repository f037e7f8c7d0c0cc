"""console: rich output for people on stdout, errors on stderr, and JSON for machines."""

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
    """Write to the current standard output. Trailing blanks are removed unless it is a terminal."""

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
    PEOPLE.width = PIPE_WIDTH  # wide enough for a log
ERRORS = Console(stderr=True, highlight=False)
GONE = (errno.EPIPE, errno.EIO, errno.EBADF)
"""Error numbers of a pipe or terminal that is closed for good."""


class _Steady:
    """Wrap a text stream, and drop text that cannot be written.

    The reader or terminal may be gone, or the disk full. With `always` false a full disk remains an error.
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
        """Flush once more. A failure in Python's own flush would end with exit code 120."""
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
    """Let no work end within the block because its output cannot be written."""
    if sys.stdout is None or sys.stderr is None:
        yield  # closed at the start, which rich handles
        return
    stream = _Steady(console.file)
    console.file = cast(IO[str], stream)
    try:
        yield
    finally:
        stream.close()
        console.file = OUTPUT if console is PEOPLE else cast(IO[str], None)  # rich then uses the current sys.stderr


@contextlib.contextmanager
def piped() -> Iterator[None]:
    """Keep the exit code if stdout's reader goes away (`lorafit check … | head`).

    rich, click and Python itself would each end with another exit code.
    """
    stdout = sys.stdout
    if stdout is None:
        yield  # closed at the start
        return
    stream = _Steady(stdout, always=False)
    sys.stdout = cast(TextIO, stream)
    try:
        yield
    finally:
        sys.stdout = stdout
        stream.close()


def say(line: str = "") -> None:
    """Print one line of rich markup. Wrapped lines keep its indent."""
    text = line.lstrip(" ")
    indent = len(line) - len(text)
    PEOPLE.print(Padding(text, (0, 0, 0, indent), expand=False) if indent else text)


def heading(title: str, detail: str = "") -> None:
    """Print a stage of the work: a bold title and a detail."""
    PEOPLE.print(f"[bold]{title:<9}[/bold] {detail}")


def counted(count: int, noun: str) -> str:
    """Return a count with its noun: `1 step`, `1,200 steps`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def show_error(sentence: str, label: str = "error") -> None:
    """Print one sentence on stderr. The exit code is independent of the output."""
    colour = "bold red" if label == "error" else "bold yellow"
    with steady(ERRORS):
        ERRORS.print(Text.assemble((f"{label}: ", colour), one_line(near(sentence))), soft_wrap=True)


def is_follower() -> bool:
    """Return True in all processes of a run but the first, which alone speaks."""
    return os.environ.get("RANK", "0") != "0"


def show_json(content: Any) -> None:
    """Print one JSON object on stdout, with null for NaN, which JSON does not have."""
    print(json.dumps(without_infinities(content), indent=1, ensure_ascii=False))


def without_infinities(content: Any) -> Any:
    """Return `content` with null for every number that JSON cannot hold."""
    if isinstance(content, float) and not math.isfinite(content):
        return None
    if isinstance(content, dict):
        return {key: without_infinities(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [without_infinities(value) for value in content]
    return content


def show_settings(rows: Iterable[tuple[str, Any, str]], names: Mapping[str, str] | None = None) -> None:
    """Show every setting with value and source: a table of set ones, then defaults.

    A recipe's line that repeats a default is a default: the recipe of a run has every setting.
    `names` has the user's own name of a setting, if it differs.
    """
    from lorafit.config import RunConfig  # pydantic stays out of --help

    given, defaults = Table.grid(padding=(0, 2)), []
    for key, value, source in rows:
        usual = RunConfig.model_fields[key].get_default(call_default_factory=True)
        if source == "default" or (source == "recipe" and value == usual):
            defaults.append(f"{key} {_shown(key, value)}")
        else:
            name = f"{source} ({names[key]})" if names and key in names else source
            given.add_row(key, Text(_shown(key, value), style="bold"), Text(name, style="dim"))
    for column in given.columns:
        column.overflow = "fold"  # a path has no spaces to wrap at
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


LINE_OF_ITS_OWN = f"\n{'':<12}"


def show_next(*commands: tuple[str, str], title: str = "next") -> None:
    """Show the next commands: (command, purpose) each."""
    for number, (command, purpose) in enumerate(commands):
        head = f"[bold]{title:<9}[/bold]" if number == 0 else " " * 9
        fits = len(f"{title:<9} {command}  {purpose}") <= PEOPLE.width
        why = f"{'  ' if fits else LINE_OF_ITS_OWN}[dim]{escape(purpose)}[/dim]" if purpose else ""
        # wrapped by the terminal alone, so that a command can be copied
        PEOPLE.print(f"{head} [cyan]{escape(command)}[/cyan]{why}", soft_wrap=True)


def visible(text: str) -> str:
    """Return `text` with its control characters but line ends as escapes: a file's name may hold a terminal's codes."""
    return "".join(char if char.isprintable() or char == "\n" else repr(char)[1:-1] for char in text)


def one_line(text: str) -> str:
    """Return `text` as one printable line: a path may hold a line end too."""
    return visible(text).replace("\n", "\\n")


def near(text: str) -> str:
    """Return `text` with paths in the current folder made relative."""
    with contextlib.suppress(FileNotFoundError):  # the current folder is removed
        text = text.replace(f"{Path.cwd()}{os.sep}", "")
    return text


def typed(*words: str) -> str:
    """Return the words of a command as the user types them."""
    return " ".join(near(shlex.quote(near(word))) for word in words)


def loss(value: float) -> str:
    """Return a loss as text, NaN as "NaN"."""
    return "NaN" if math.isnan(value) else f"{value:.4f}"


def gib(size_bytes: float) -> str:
    """Return bytes as text, such as `1.5 GiB`."""
    from lorafit.config.foreign_text import size_in_words  # pydantic stays out of --help

    return size_in_words(size_bytes)


def duration(seconds: float) -> str:
    """Return seconds as text, such as `1 min 05 s`."""
    if not math.isfinite(seconds):
        return "?"
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"
