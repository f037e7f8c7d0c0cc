"""lorafit plan"""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer
from rich.padding import Padding
from rich.table import Table

from lorafit.cli import flags
from lorafit.cli.console import PEOPLE, duration, gib, heading, say, show_findings, show_json, show_settings
from lorafit.cli.data_view import ReadingBar, show_summary
from lorafit.findings import has_errors

if TYPE_CHECKING:
    from lorafit.plan import Plan


def plan(
    data: flags.Data,
    base: flags.Base = None,
    gpu: flags.Gpu = None,
    vram: flags.Vram = None,
    goal: flags.Goal = None,
    set: flags.Set = None,
    json: flags.Json = False,
) -> None:
    """Choose method, rank, targets and precision, and predict memory, time and cost. Needs no GPU and no weights."""
    from lorafit.api.plan import plan as run_plan

    settings = flags.settings_from(set, gpu=gpu, vram=vram, goal=goal)
    with ReadingBar() as bar:
        planned = run_plan(data, base, on_progress=bar.show, **settings)
    failed = has_errors([*planned.plan.findings, *planned.prepared.findings])
    if json:
        show_json(planned.to_dict())
        raise typer.Exit(1 if failed else 0)
    heading("data")
    show_summary(planned.prepared.summary)
    show_plan(planned.plan)
    heading("settings")
    show_settings(planned.resolved.table())
    findings = [*planned.prepared.findings, *planned.plan.findings]
    heading("findings", "none" if not findings else str(len(findings)))
    show_findings(findings)
    raise typer.Exit(1 if failed else 0)


def show_plan(plan: Plan) -> None:
    """The method, each decision with its reason, the memory by component, time and cost."""
    heading("plan", f"[bold]{plan.method}[/bold] on {plan.hardware.name}")
    decisions = Table.grid(padding=(0, 2))
    for decision in plan.decisions:
        decisions.add_row(decision.key, f"[bold]{decision.value}[/bold]", f"[dim]{decision.reason}[/dim]")
    PEOPLE.print(Padding(decisions, (0, 0, 0, 2)))
    memory = plan.memory
    share = f"of {gib(plan.hardware.memory_bytes)}"
    heading("memory", f"[bold]{gib(memory.peak_bytes)}[/bold] ±{memory.uncertainty:.0%} {share}")
    parts = Table.grid(padding=(0, 2))
    for part in memory.components:
        parts.add_row(part.name, f"[bold]{gib(part.size_bytes)}[/bold]", f"[dim]{part.assumes}[/dim]")
    PEOPLE.print(Padding(parts, (0, 0, 0, 2)))
    low, high = plan.time_s
    cheap, dear = plan.cost_usd
    cost = f", ${cheap:.2f} to ${dear:.2f}" if dear >= 0.01 else ""
    heading("time", f"{plan.steps:,} steps, {duration(low)} to {duration(high)}{cost}")
    if not plan.runnable:
        say("  [yellow]lorafit cannot run this method yet; the recipe is for the tool that can[/yellow]")
