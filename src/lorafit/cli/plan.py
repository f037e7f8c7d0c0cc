"""lorafit plan"""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from lorafit.cli import flags
from lorafit.cli.console import PEOPLE, counted, duration, gib, heading, say, show_findings, show_json, show_settings
from lorafit.cli.data_view import ReadingBar, show_summary
from lorafit.findings import has_errors

if TYPE_CHECKING:
    from lorafit.planning import Plan


def plan(
    data: flags.Data,
    base: flags.Base = None,
    gpu: flags.Gpu = None,
    gpu_memory: flags.GpuMemory = None,
    goal: flags.Goal = None,
    set: flags.Set = None,
    json: flags.Json = False,
) -> None:
    """Choose method, rank, targets and precision, and predict memory, time and cost. Needs no GPU and no weights."""
    from lorafit.api.plan import plan as run_plan

    settings = flags.settings_from(set, base=base, gpu=gpu, gpu_memory=gpu_memory, goal=goal)
    with ReadingBar() as bar:
        planned = run_plan(data, on_progress=bar.show, **settings)
    failed = has_errors([*planned.plan.findings, *planned.prepared.findings])
    if json:
        show_json(planned.to_dict())
        raise typer.Exit(1 if failed else 0)
    heading("data")
    show_summary(planned.prepared.summary)
    show_plan(planned.plan, options=True)
    heading("settings")
    show_settings(planned.resolved.table())
    findings = [*planned.prepared.findings, *planned.plan.findings]
    heading("findings", "none" if not findings else str(len(findings)))
    show_findings(findings)
    if not planned.plan.runnable:
        heading("recipe", "for the tool that can run this method")
        PEOPLE.print(Text(planned.recipe))
    raise typer.Exit(1 if failed else 0)


def show_plan(plan: Plan, *, options: bool = False) -> None:
    """The method, each decision with its reason, the memory by component, time and cost; with `options` also
    what every row of the decision matrix would take."""
    heading("plan", f"[bold]{plan.method}[/bold] of {plan.shape.name or 'the base'} on {plan.hardware.name}")
    decisions = _grid()
    for decision in plan.decisions:
        decisions.add_row(decision.key, f"[bold]{decision.value}[/bold]", f"[dim]{escape(decision.reason)}[/dim]")
    decisions.add_row("targets", f"[bold]{', '.join(plan.targets)}[/bold]", "[dim]the names in this model[/dim]")
    _show_grid(decisions)
    for note in (*plan.shape.notes, *plan.hardware.notes):
        say(f"  [dim]note: {escape(note)}[/dim]")
    memory = plan.memory
    budget = gib(plan.hardware.memory_bytes)
    heading("memory", f"[bold]{gib(memory.peak_bytes)}[/bold] ±{memory.uncertainty:.0%} of {budget}")
    parts = _grid()
    for part in memory.components:
        parts.add_row(part.name, f"[bold]{gib(part.size_bytes)}[/bold]", f"[dim]{escape(part.assumes)}[/dim]")
    if memory.host_bytes:
        note = "pinned meanwhile: what layers send away, and embeddings that stay there"
        parts.add_row("host memory", f"[bold]{gib(memory.host_bytes)}[/bold]", f"[dim]{note}[/dim]")
    _show_grid(parts)
    heading("time", f"{counted(plan.steps, 'step')}, {_span(plan.time_s, plan.cost_usd)}")
    if options:
        _show_options(plan)


def _show_options(plan: Plan) -> None:
    heading("matrix", "what each method needs, without unpacked weights and CUDA graphs")
    table = _grid()
    for option in plan.options:
        style = "bold" if option.chosen else "dim"
        where = f"{option.gpus} × {option.hardware}" if option.gpus > 1 else option.hardware
        size = gib(option.peak_bytes) + ("" if option.fits else " does not fit")
        cells = ("→" if option.chosen else "", option.method, option.when, where, size)
        table.add_row(
            *(f"[{style}]{escape(cell)}[/{style}]" for cell in (*cells, _span(option.time_s, option.cost_usd)))
        )
    _show_grid(table)


def _span(time_s: tuple[float, float], cost_usd: tuple[float, float]) -> str:
    cost = f", ${cost_usd[0]:,.2f} to ${cost_usd[1]:,.2f}" if cost_usd[1] >= 0.01 else ""
    return f"{duration(time_s[0])} to {duration(time_s[1])}{cost}"


def _grid() -> Table:
    return Table.grid(padding=(0, 2))


def _show_grid(grid: Table) -> None:
    for column in grid.columns:
        column.overflow = "fold"  # a policy is one long word, and no part of it may be left out
    PEOPLE.print(Padding(grid, (0, 0, 0, 2)))
