"""plan_view: the display of a plan: verdict, choices with reasons, or every number."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from lorafit.cli.flags import assigned_by_flags
from lorafit.cli.screen.console import PEOPLE, counted, duration, gib, heading, near, say
from lorafit.findings import Severity

if TYPE_CHECKING:
    from lorafit.config import Resolved
    from lorafit.data import Summary
    from lorafit.findings import Finding
    from lorafit.planning import Plan

CHOSEN = ("gpus", "quantization", "rank", "targets", "memory_policy", "optimizer")
"""Decisions that are explained below the verdict."""
SCALES = ((1e12, "T"), (1e9, "B"), (1e6, "M"))


def show_verdict(plan: Plan, findings: list[Finding]) -> None:
    """Show in one line whether the run fits.

    Below it stand the findings that stop the run, or the settings that would fit.
    """
    what = f"{_size(plan.shape.parameters)} {plan.method} on {_where(plan)}"
    errors = [finding for finding in findings if finding.severity is Severity.ERROR]
    memory = next((finding for finding in errors if finding.code == "P0" and finding.where == "memory"), None)
    has = gib(plan.hardware.memory_bytes)
    if not plan.runnable:
        _verdict("cannot run", "bold red", f"{what}: {plan.reason}")
    elif memory is not None:
        _verdict("does not fit", "bold red", f"{what}: needs {gib(plan.memory.peak_bytes)}, {has} allowed")
        heading("try", escape(assigned_by_flags(memory.fix)))
    else:
        took = _short_span(plan.time_s, plan.cost_usd)
        needs = gib(plan.memory.peak_bytes).removesuffix(f" {has.rpartition(' ')[2]}")
        each = " each" if plan.gpus > 1 else ""
        _verdict("fits", "bold green", f"{what}: {needs} of {has}{each}, {took}")
    if others := [finding for finding in errors if finding is not memory]:
        stops = f"fix {counted(len(others), 'finding')} below before training"
        heading("stopped", f"[bold red]{stops}[/bold red]")


def show_data_line(summary: Summary) -> None:
    """Show the data that were read, in one line."""
    rows = f"{counted(summary.read, 'row')}, {summary.train_rows:,} to train on, {summary.holdout_rows:,} held out"
    tokens = f"; {summary.tokens:,} tokens, longest row {summary.longest:,}" if summary.tokenised else ""
    heading("data", rows + tokens)


def show_choices(plan: Plan, resolved: Resolved) -> None:
    """Show each choice and its reason."""
    from lorafit.config import parse_bytes  # pydantic stays out of --help

    reasons = {decision.key: (str(decision.value), decision.reason) for decision in plan.decisions}
    source = resolved.sources["targets"].value
    why = "q and v projections, as in QLoRA's recipe" if source == "default" else f"set by {source}"
    if plan.targets:
        reasons["targets"] = (_targets(plan), why)
    chosen = _grid()
    for key in CHOSEN:
        if key not in reasons:
            continue
        value, reason = reasons[key]
        if key == "gpus":
            reason = gpus_in_words(int(value), reason)
        if key == "memory_policy":
            value, _, reason = reason.partition(": ") if ": " in reason else (value, "", reason)
        chosen.add_row(f"{key:<13}", Text.assemble((value, "bold"), "  ", (reason, "dim")))
    _show_grid(chosen)
    asked = resolved.config.gpu_memory
    understood = [f"gpu_memory {asked} is read as {gib(parse_bytes(asked))}"] if asked and "i" not in asked else []
    for note in (*understood, *plan.notes):
        say(f"  [dim]note: {escape(note)}[/dim]")


def show_plan(plan: Plan, *, options: bool = False) -> None:
    """Show the method, each decision with its reason, the memory by component, time and cost.

    With `options` every row of the decision matrix is shown too.
    """
    heading("plan", f"[bold]{plan.method}[/bold] of {plan.shape.name or 'the base'} on {_where(plan)}")
    decisions = _grid()
    for decision in plan.decisions:
        decisions.add_row(decision.key, f"[bold]{decision.value}[/bold]", f"[dim]{escape(decision.reason)}[/dim]")
    if plan.targets:
        decisions.add_row("targets", f"[bold]{', '.join(plan.targets)}[/bold]", "[dim]the names in this model[/dim]")
    _show_grid(decisions)
    for note in plan.notes:
        say(f"  [dim]note: {escape(note)}[/dim]")
    memory = plan.memory
    budget = gib(plan.hardware.memory_bytes)
    heading("memory", f"[bold]{gib(memory.peak_bytes)}[/bold] ±{memory.uncertainty:.0%} of {budget}")
    parts = _grid()
    for part in memory.components:
        parts.add_row(part.name, f"[bold]{gib(part.size_bytes)}[/bold]", f"[dim]{escape(part.assumes)}[/dim]")
    if memory.host_bytes:
        note = "pinned: offloaded activations, embeddings, or moments and gradients, by the settings above"
        parts.add_row("host memory", f"[bold]{gib(memory.host_bytes)}[/bold]", f"[dim]{note}[/dim]")
    _show_grid(parts)
    heading("time", f"{counted(plan.steps, 'step')}, {_span(plan.time_s, plan.cost_usd)}")
    if options:
        _show_options(plan)


def gpus_in_words(count: int, reason: str) -> str:
    """Return the number of GPUs of a run whose settings name none, with its reason and flag."""
    other = "--gpus 1 takes one" if count > 1 else "--gpus all takes every one"
    return f"trains on {counted(count, 'GPU')}: {reason}; {other}"


def _verdict(word: str, style: str, rest: str) -> None:
    PEOPLE.print(f"[{style}]{word:<9}[/{style}] {escape(near(rest))}")


def _where(plan: Plan) -> str:
    several = plan.gpus > 1 and plan.runnable
    kind = " (CPU)" if plan.hardware.kind == "cpu" and "CPU" not in plan.hardware.name else ""
    return f"{plan.gpus} × {plan.hardware.name}" if several else plan.hardware.name + kind


def _targets(plan: Plan) -> str:
    names = plan.targets
    return ", ".join(names) if len(names) <= 4 else f"{len(names)} kinds of linear layers"


def _size(parameters: int) -> str:
    """Return a model's size as in its name: `8B`, `494M`."""
    scale, unit = next(((scale, unit) for scale, unit in SCALES if parameters >= scale), (1.0, ""))
    size = parameters / scale
    return f"{size:.0f}{unit}" if size >= 10 or abs(size - round(size)) < 0.1 else f"{size:.1f}{unit}"


def _short_span(time_s: tuple[float, float], cost_usd: tuple[float, float]) -> str:
    """Return time and cost in short: `1–3 min, ~$0.02`."""
    high = time_s[1]
    scale, name = next((one for one in ((3600.0, "h"), (60.0, "min")) if high >= 1.5 * one[0]), (1.0, "s"))
    first, last = (f"{bound / scale:.{0 if bound >= scale else 1}f}" for bound in time_s)
    span = f"{first} {name}" if first == last else f"{first}–{last} {name}"
    cost = sum(cost_usd) / 2
    return f"{span}, ~${cost:,.2f}" if cost >= 0.01 else span


def _show_options(plan: Plan) -> None:
    heading("matrix", "needs of each method, without dequantized weights and CUDA graphs")
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
        column.overflow = "fold"  # a memory policy has no spaces to wrap at, and must stay complete
    PEOPLE.print(Padding(grid, (0, 0, 0, 2)))
