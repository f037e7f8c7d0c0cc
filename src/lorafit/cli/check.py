"""lorafit check"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from lorafit.cli import flags
from lorafit.cli.console import heading, say, show_findings, show_json
from lorafit.cli.data_view import ReadingBar, show_rows_coloured, show_summary
from lorafit.errors import UsageError


def check(
    data: flags.Data,
    base: flags.Base = None,
    show: Annotated[
        int, typer.Option("--show", min=0, help="Print this many rows, coloured by what is supervised.")
    ] = 0,
    fix: Annotated[
        Path | None,
        typer.Option("--fix", metavar="OUT", help="Write the data with mechanical fixes applied.", show_default=False),
    ] = None,
    select: flags.Select = None,
    ignore: flags.Ignore = None,
    on_bad: flags.OnBad = None,
    on_long: flags.OnLong = None,
    field_map: flags.Map = None,
    holdout: flags.Holdout = None,
    set: flags.Set = None,
    json: flags.Json = False,
) -> None:
    """Read every row and judge it: exit 0 when clean or with warnings, 1 with errors, 2 for wrong usage."""
    from lorafit.api.check import check as run_check
    from lorafit.data import fix_rows, show_rows

    settings = flags.settings_from(
        set,
        base=base,
        select=select,
        ignore=ignore,
        on_bad=on_bad,
        on_long=on_long,
        field_map=field_map,
        holdout=holdout,
    )
    if show and not settings.get("base"):
        raise UsageError("showing tokens needs a tokenizer", where="--show", fix="add --base")
    with ReadingBar() as bar:
        report = run_check(data, on_progress=bar.show, **settings)
    fixed = fix_rows(report.resolved.config, fix) if fix else None
    if json:
        show_json(report.to_dict() | ({"fixed": fixed.to_dict()} if fixed else {}))
        raise typer.Exit(0 if report.ok else 1)
    heading("data")
    show_summary(report.prepared.summary)
    heading("findings", "none" if not report.findings else f"{len(report.findings)}")
    show_findings(report.findings)
    if show and report.template:
        show_rows_coloured(show_rows(report.prepared, report.template, show))
    if fixed:
        written = f"{fixed.written:,} of {fixed.read:,} rows written to {escape(fixed.out)}"
        say(f"[bold]fixed[/bold] {fixed.changes}: {written}")
        if fixed.rejected_file:
            say(f"  [dim]the unreadable ones are in {escape(fixed.rejected_file)}[/dim]")
        left = report.prepared.summary.rejected - fixed.rejected
        if left > 0:
            say(f"  [dim]{left:,} of them are rejected still, for a person to judge: see the findings[/dim]")
    raise typer.Exit(0 if report.ok else 1)
