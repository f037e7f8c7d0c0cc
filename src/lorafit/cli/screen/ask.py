"""ask: ask in a terminal for missing arguments of `lorafit train`.

The matching command is shown.
"""

from __future__ import annotations

from pathlib import Path

import typer
from rich.markup import escape

from lorafit.cli import flags
from lorafit.cli.screen.console import PEOPLE, say, show_next

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")


def ask_for_run(base: str | None, gpu_memory: str | None) -> tuple[list[str], str, str | None]:
    """Ask for data, base and GPU memory, and return them once the user confirms."""
    found = [path.name for path in sorted(Path.cwd().iterdir()) if path.suffix in SUFFIXES]
    say("[bold]lorafit train[/bold] needs data and a base model. Press Enter to accept the value in brackets.")
    data = _asked("data: a file of examples", found[0] if len(found) == 1 else "")
    base = base or _asked("base: a local folder or a hub id, as Qwen/Qwen3-0.6B", "")
    if gpu_memory is None:
        gpu_memory = _asked("GPU memory to use, as 8GB", "all free memory", optional=True) or None
    show_next((flags.command("train", [data], {"base": base, "gpu_memory": gpu_memory}, None), ""))
    if not typer.confirm("train now?", default=True):
        raise typer.Exit
    return [data], base, gpu_memory


def _asked(question: str, default: str, *, optional: bool = False) -> str:
    """Return the answer. An empty one means `default`, or no value if it is optional."""
    hint = f" [dim]({escape(default)})[/dim]" if default else ""
    while True:
        answer = PEOPLE.input(f"  {escape(question)}{hint}: ").strip()
        if answer or optional:
            return answer
        if default:
            return default
