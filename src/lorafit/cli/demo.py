"""lorafit demo"""

from __future__ import annotations

from typing import Annotated

import typer
from rich.markup import escape

from lorafit.cli import flags
from lorafit.cli.screen.console import say, show_json, steady
from lorafit.demo import task_named

EXAMPLES = """Examples:

lorafit demo

lorafit demo --task tickets --seed 1"""


def demo(
    task: Annotated[str, typer.Option("--task", help="orders, dates or tickets.")] = "orders",
    seed: Annotated[
        int, typer.Option("--seed", metavar="NUMBER", min=0, help="Seed of the data and of everything random.")
    ] = 0,
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
    """Train a small bundled base on a task in minutes, on two cores, and verify the result."""
    from lorafit.api.demo import usual_path
    from lorafit.cli.screen.demo_view import run_demo

    task_named(task)
    if not json:
        what = f"teaches a base of 3.5 M parameters the task '{escape(task)}', as your own run would go"
        say(f"[bold]lorafit demo[/bold] [dim]{what}[/dim]")
        usual = usual_path(task, seed)
        if out is None and usual.exists():
            say(f"  [dim]{usual} is there already and stays as it is: this run starts over beside it[/dim]")
    with steady():
        result = run_demo(task, seed, out, quiet=json)
    if json:
        show_json(result.to_dict())
    raise typer.Exit(0 if result.merged.passed else 1)
