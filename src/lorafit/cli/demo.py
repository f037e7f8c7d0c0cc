"""lorafit demo"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from lorafit.cli import flags
from lorafit.cli.console import heading, say, show_json, steady
from lorafit.demo import task_named

if TYPE_CHECKING:
    from lorafit.evaluate import ExactMatch

SAMPLES = 3


def demo(
    task: Annotated[str, typer.Option("--task", help="orders, dates or tickets.")] = "orders",
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the data and of everything random.")] = 0,
    out: Annotated[
        str | None,
        typer.Option(
            "--out",
            help="Run directory; default runs/demo-TASK-seedN, with -2, -3, … where that is taken.",
            show_default=False,
        ),
    ] = None,
    json: flags.Json = False,
) -> None:
    """A real run, small: a bundled base learns a task in minutes on two cores, and the result is proved."""
    from lorafit.api.demo import usual_path
    from lorafit.cli.demo_watch import run_demo

    task_named(task)
    if not json:
        what = f"teaches a base of 3.5 M parameters the task '{escape(task)}', as your own run would go"
        say(f"[bold]lorafit demo[/bold] [dim]{what}[/dim]")
        usual = usual_path(task, seed)
        if out is None and usual.exists():
            say(f"  [dim]{usual} is there already and stays as it is: this one begins anew beside it[/dim]")
    with steady():
        result = run_demo(task, seed, out, quiet=json)
    if json:
        show_json(result.to_dict())
    raise typer.Exit(0 if result.merged.passed else 1)


def show_exact_match(before: ExactMatch, after: ExactMatch) -> None:
    """Base against tuned on the held-out rows."""
    heading(
        "evaluate",
        f"exact match on {len(after.samples)} held-out rows: "
        f"base {before.share:.1%} → tuned [bold green]{after.share:.1%}[/bold green]",
    )


def show_samples(before: ExactMatch, after: ExactMatch) -> None:
    """The first rows: what was asked, and both answers."""
    heading("samples")
    for base, tuned in list(zip(before.samples, after.samples, strict=True))[:SAMPLES]:
        say(f"  [bold]asked[/bold] {escape(tuned.prompt.splitlines()[-1])}")
        first = (base.answer.strip().splitlines() or ["(nothing)"])[0]
        say(f"  [yellow]base [/yellow] {escape(first[:90])}")
        mark = "[green]✓[/green]" if tuned.matches else f"[red]✗[/red] expected {escape(tuned.expected)}"
        say(f"  [green]tuned[/green] {escape(tuned.answer)} {mark}")
