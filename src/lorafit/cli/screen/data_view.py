"""data_view: the display of data: summary, length histogram, and rows coloured by supervision."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.text import Text

from lorafit.cli.screen.console import PEOPLE, counted, duration, near, say

if TYPE_CHECKING:
    from lorafit.data import Progress, ShownRow, Summary

BAR = 32


def show_summary(summary: Summary) -> None:
    """Show the row counts and the data stats."""
    shape = f"row shape [bold]{summary.shape}[/bold]"
    say(f"  {counted(len(summary.files), 'file')}, {shape}, {duration(summary.seconds)}{_where(summary)}")
    say(
        f"  {counted(summary.read, 'row')} read = {summary.kept:,} kept + {summary.rejected:,} rejected + "
        f"{summary.dropped:,} dropped; {summary.truncated} truncated; "
        f"{summary.duplicates:,} exact and {summary.near_duplicates:,} near duplicates"
    )
    cut = f", {summary.split:,} conversations split at their turns" if summary.split else ""
    say(f"  {summary.train_rows:,} to train on, {summary.holdout_rows:,} held out{cut}")
    if not summary.tokenised:
        say("  [dim]no --base, so no tokens were counted[/dim]")
        return
    say(
        f"  {summary.tokens:,} tokens, {summary.supervised_share:.0%} supervised, longest row {summary.longest:,}; "
        f"packed fill {summary.packed_fill:.0%}, {counted(summary.steps_per_epoch, 'step')} an epoch"
    )
    show_histogram(summary)


def _where(summary: Summary) -> str:
    if summary.cached:
        return " (from the cache)"
    searched = summary.near_duplicate_seconds
    return f", {duration(searched)} of it for near duplicates" if searched >= 1 else ""


def show_histogram(summary: Summary) -> None:
    """Show rows by length in tokens, as bars of text."""
    edges, counts = summary.histogram.edges, summary.histogram.counts
    peak = max(counts, default=0)
    for low, high, count in zip(edges, edges[1:], counts, strict=False):
        if count:
            say(f"  {low:>7,}–{high - 1:<7,} [cyan]{'█' * max(1, round(BAR * count / peak))}[/cyan] {count:,}")


def show_rows_coloured(rows: Sequence[ShownRow]) -> None:
    """Show each row's text, coloured by supervision.

    Prompts are dim, supervised text is green, and the stop token is reversed. Without colour, supervised text is in
    ⟦brackets⟧.
    """
    is_plain = PEOPLE.color_system is None or PEOPLE.no_color
    for row in rows:
        supervised = sum(token.supervised for token in row.tokens)
        counts = f"{len(row.tokens)} tokens, {supervised} supervised"
        PEOPLE.print(f"[bold]{escape(near(row.source))}[/bold] [dim]{counts}[/dim]")
        PEOPLE.print(_bracketed(row) if is_plain else _coloured(row), soft_wrap=is_plain)
    if rows and is_plain:
        say("supervised text is in ⟦brackets⟧, the rest is prompt")
    elif rows:
        say("[dim]prompt is dim, [/dim][green]supervised text is green[/green][dim], the stop token is reversed[/dim]")


def shown_as_json(rows: Sequence[ShownRow]) -> list[dict[str, Any]]:
    """Return the shown rows as JSON values."""
    return [asdict(row) for row in rows]


def _coloured(row: ShownRow) -> Text:
    text = Text()
    for token in row.tokens:
        style = ("reverse " if token.is_stop else "") + ("green" if token.supervised else "dim")
        text.append(token.text, style=style)
    return text


def _bracketed(row: ShownRow) -> Text:
    text, inside = Text(), False
    for token in row.tokens:
        if token.supervised != inside:
            text.append("⟦" if token.supervised else "⟧")
            inside = token.supervised
        text.append(token.text)
    return text.append("⟧") if inside else text


class ReadingBar:
    """Show a status line while data are read. Without a terminal it shows none."""

    def __init__(self) -> None:
        self.status = PEOPLE.status("reading") if PEOPLE.is_terminal else None

    def __enter__(self) -> ReadingBar:
        if self.status:
            self.status.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.status:
            self.status.stop()

    def show(self, progress: Progress) -> None:
        """Show the stage, the number of rows, and the time left."""
        if self.status:
            left = f", {duration(progress.eta_s)} left" if progress.eta_s else ""
            self.status.update(f"{progress.stage}: {progress.rows:,} rows{left}")

    def show_step(self, stage: str, done: int, total: int) -> None:
        """Show the stage, and how many of its rows are done."""
        if self.status:
            self.status.update(f"{stage}: {done:,} of {total:,} rows")
