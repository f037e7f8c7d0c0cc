"""demo: the command `lorafit demo`."""

from __future__ import annotations

from typing import Annotated, Literal

import typer
from rich.markup import escape

from lorafit.cli import flags
from lorafit.cli.screen.console import say, show_json, steady
from lorafit.demo import task_named
from lorafit.imports import importing_torch

EXAMPLES = """Examples:

lorafit demo

lorafit demo --task tickets --seed 1

lorafit demo --method full"""


def demo(
    task: Annotated[str, typer.Option("--task", metavar="TASK", help="Task: orders, dates or tickets.")] = "orders",
    method: Annotated[
        Literal["lora", "full"], typer.Option("--method", help="Training method: lora, or full for every weight.")
    ] = "lora",
    seed: Annotated[int, typer.Option("--seed", metavar="NUMBER", min=0, help="Seed of data and training.")] = 0,
    out: Annotated[
        str | None,
        typer.Option(
            "--out",
            metavar="FOLDER",
            help="Run directory; default runs/demo-TASK-seedN, with -2, -3, … if it exists.",
            show_default=False,
        ),
    ] = None,
    json: flags.Json = False,
) -> None:
    """Train a small bundled base on a task, and verify the result. It takes minutes on two cores."""
    with importing_torch():
        from lorafit.api.demo import usual_path
        from lorafit.cli.screen.demo_view import run_demo

    task_named(task)
    if not json:
        what = f"trains a base of 3.5 M parameters on the task '{escape(task)}', like a run of your own"
        say(f"[bold]lorafit demo[/bold] [dim]{what}[/dim]")
        usual = usual_path(task, seed, method)
        if out is None and usual.exists():
            say(f"  [dim]{usual} already exists and stays unchanged; this run gets a new folder[/dim]")
    with steady():
        result = run_demo(task, seed, out, method=method, quiet=json)
    if json:
        show_json(result.to_dict())
    raise typer.Exit(0 if result.merged.passed else 1)
