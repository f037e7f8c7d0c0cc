"""check: the command `lorafit check`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from lorafit.cli import flags
from lorafit.cli.screen.console import counted, heading, near, say, show_json, show_next
from lorafit.cli.screen.data_view import ReadingBar, show_rows_coloured, show_summary, shown_as_json
from lorafit.cli.screen.findings_view import show_findings
from lorafit.errors import UsageError

if TYPE_CHECKING:
    from lorafit.api.check import CheckReport
    from lorafit.data import FixReport
    from lorafit.data.shown import ShownRow

EXAMPLES = """Examples:

lorafit check tickets.csv --map instruction=Subject --map "response=Agent Reply"

lorafit check rows.jsonl --base Qwen/Qwen3-8B --show 3

lorafit check rows.jsonl --fix clean.jsonl"""


def check(
    data: flags.Data = None,
    base: flags.Base = None,
    show: Annotated[
        int, typer.Option("--show", metavar="NUMBER", min=0, help="Print rows, supervised tokens marked.")
    ] = 0,
    fix: Annotated[
        Path | None,
        typer.Option("--fix", metavar="OUT", help="Write the data with mechanical fixes applied.", show_default=False),
    ] = None,
    method: flags.Method = None,
    select: flags.Select = None,
    ignore: flags.Ignore = None,
    on_bad: flags.OnBad = None,
    on_long: flags.OnLong = None,
    encoding: flags.Encoding = None,
    map: flags.Map = None,
    holdout: flags.Holdout = None,
    set: flags.Set = None,
    json: flags.Json = False,
) -> None:
    """Read and judge every row. Exit codes: 0 for clean rows or warnings, 1 for errors, 2 for wrong usage."""
    from lorafit.api.check import check as run_check
    from lorafit.data import fix_rows, show_rows

    given = {"base": base, "encoding": encoding, "field_map": map, "holdout": holdout, "method": method}
    given |= {"on_bad": on_bad, "on_long": on_long}
    settings = flags.settings_from(set, **given, select=select, ignore=ignore)
    with ReadingBar() as bar:
        report = run_check(data, on_progress=bar.show, **settings)
    if show and not report.template:
        raise UsageError("showing tokens needs a tokenizer", where="--show", fix="add --base")
    fixed = fix_rows(report.resolved.config, fix) if fix else None
    rows = show_rows(report.prepared, report.template, show) if show and report.template else []
    if json:
        show_json(report.to_dict() | _more(fixed, rows))
        raise typer.Exit(0 if report.ok else 1)
    heading("data")
    show_summary(report.prepared.summary)
    heading("findings", "none" if not report.findings else f"{len(report.findings)}")
    show_findings(report.findings, flags.words_to_read(data, given, set))
    show_rows_coloured(rows)
    _show_fixed(fixed, report)
    _show_next(report, data or [], given, set, fixed is not None)
    raise typer.Exit(0 if report.ok else 1)


def _more(fixed: FixReport | None, rows: list[ShownRow]) -> dict[str, Any]:
    """Return the keys that --fix and --show add to the JSON object."""
    return ({"fixed": fixed.to_dict()} if fixed else {}) | ({"rows": shown_as_json(rows)} if rows else {})


def _show_fixed(fixed: FixReport | None, report: CheckReport) -> None:
    if fixed is None:
        return
    written = f"{fixed.written:,} of {fixed.read:,} rows written to {escape(near(str(fixed.out)))}"
    say(f"[bold]fixed[/bold]     {fixed.changes}: {written}")
    if fixed.rejected_file:
        say(f"  [dim]the unreadable rows are in {escape(near(str(fixed.rejected_file)))}[/dim]")
    left = report.prepared.summary.rejected - fixed.rejected
    if left > 0:
        say(f"  [dim]{left:,} of the rows are still rejected; fix them by hand, as the findings say[/dim]")


def _show_next(
    report: CheckReport, data: list[str], given: dict[str, Any], set: list[str] | None, was_fixed: bool
) -> None:
    """Show the next command, with the user's own names."""
    rejected = report.prepared.summary.rejected
    if report.ok:
        named = given if report.resolved.config.base else {**given, "base": "MODEL"}
        show_next((flags.command("plan", data, named, set), "memory, time and cost of a run"))
    elif not report.resolved.config.encoding and any(finding.code == "D004" for finding in report.findings):
        recoded = flags.command("check", data, {**given, "encoding": "cp1252"}, set)
        show_next((recoded, "read the files as Windows and Excel write them"))
    elif rejected and not was_fixed:
        fixing = flags.command("check", data, {**given, "fix": "clean.jsonl"}, set)
        dropping = flags.command("check", data, {**given, "on_bad": "drop"}, set)
        without = (dropping, f"continue without the {counted(rejected, 'rejected row')}")
        show_next((fixing, "apply mechanical fixes"), *([without] if report.prepared.is_mended_by_drop else []))
