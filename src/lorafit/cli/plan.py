"""plan: the command `lorafit plan`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from lorafit.cli import flags
from lorafit.cli.screen.console import PEOPLE, heading, show_json, show_next, show_settings
from lorafit.cli.screen.data_view import ReadingBar, show_summary
from lorafit.cli.screen.findings_view import show_findings, show_short_findings
from lorafit.cli.screen.plan_view import show_choices, show_data_line, show_plan, show_verdict
from lorafit.findings import has_errors

if TYPE_CHECKING:
    from lorafit.api.plan import PlannedRun

EXAMPLES = """Examples:

lorafit plan rows.jsonl --base Qwen/Qwen3-8B --gpu 4090

lorafit plan rows.jsonl --base Qwen/Qwen3-8B --gpu "2 x 4090"

lorafit plan rows.jsonl --base Qwen/Qwen3-8B --gpu-memory 8GB --explain"""
SHORT_FINDINGS = 4


def plan(
    data: flags.Data = None,
    base: flags.Base = None,
    gpu: flags.Gpu = None,
    gpus: flags.Gpus = None,
    gpu_memory: flags.GpuMemory = None,
    goal: flags.Goal = None,
    method: flags.Method = None,
    lr: flags.Lr = None,
    epochs: flags.Epochs = None,
    rank: flags.Rank = None,
    max_length: flags.MaxLength = None,
    batch: flags.Batch = None,
    select: flags.Select = None,
    ignore: flags.Ignore = None,
    on_bad: flags.OnBad = None,
    on_long: flags.OnLong = None,
    encoding: flags.Encoding = None,
    map: flags.Map = None,
    holdout: flags.Holdout = None,
    out: flags.Out = None,
    set: flags.Set = None,
    explain: Annotated[bool, typer.Option("--explain", help="Show every number and reason behind the plan.")] = False,
    json: flags.Json = False,
) -> None:
    """Plan a run: whether it fits, its cost, and why. Needs no GPU and no weights."""
    from lorafit.api.plan import plan as run_plan

    given = {
        "base": base, "gpus": gpus, "gpu_memory": gpu_memory, "goal": goal, "method": method, "lr": lr,
        "epochs": epochs, "rank": rank, "max_length": max_length, "examples_per_step": batch, "on_bad": on_bad,
        "on_long": on_long, "encoding": encoding, "field_map": map, "holdout": holdout, "out": out,
    }  # fmt: skip
    settings = flags.settings_from(set, **given, gpu=gpu, select=select, ignore=ignore)
    with ReadingBar() as bar:
        planned = run_plan(data, on_progress=bar.show, **settings)
    failed = has_errors([*planned.plan.findings, *planned.prepared.findings]) or not planned.plan.runnable
    if json:
        show_json(planned.to_dict())
        raise typer.Exit(1 if failed else 0)
    _show(planned, data or [], {**given, "gpu": gpu}, set, explained=explain, failed=failed)
    raise typer.Exit(1 if failed else 0)


def _show_short(planned: PlannedRun) -> None:
    """Show the verdict, the data in a line, and what was chosen."""
    show_verdict(planned.plan, [*planned.plan.findings, *planned.prepared.findings])
    show_data_line(planned.prepared.summary)
    show_choices(planned.plan, planned.resolved)


def _show_all(planned: PlannedRun, data: list[str]) -> None:
    """Show the data, the plan with all its numbers, the settings and the findings."""
    findings = [*planned.prepared.findings, *planned.plan.findings]
    show_verdict(planned.plan, findings)
    heading("data")
    show_summary(planned.prepared.summary)
    show_plan(planned.plan, options=True)
    heading("settings")
    show_settings(planned.resolved.table(), planned.resolved.names)
    heading("findings", "none" if not findings else str(len(findings)))
    show_findings(findings, data)
    if not planned.plan.runnable:
        heading("recipe", "for a machine with these GPUs")
        PEOPLE.print(Text(planned.recipe))


def _show(
    planned: PlannedRun,
    data: list[str],
    given: dict[str, Any],
    set: list[str] | None,
    *,
    explained: bool,
    failed: bool,
) -> None:
    """Show the plan, in short or with every number, and the next commands."""
    if explained:
        _show_all(planned, flags.words_to_read(data, given, set))
    else:
        _show_short(planned)
    details = flags.command("plan", data, {**given, "explain": True}, set)
    if not explained:
        # the verdict already reports the memory
        plan_findings = [one for one in planned.plan.findings if (one.code, one.where) != ("P0", "memory")]
        show_short_findings([*plan_findings, *planned.prepared.findings], SHORT_FINDINGS)
    if not failed:
        many = f"{planned.plan.gpus} × " if planned.plan.gpus > 1 else "the "
        where = f"on a machine with {many}{planned.plan.hardware.name}" if given["gpu"] else ""
        several = str(planned.plan.gpus) if planned.plan.gpus > 1 and given["gpu"] else None
        again = {**given, "gpu": None, "gpus": given["gpus"] or several}
        show_next((flags.command("train", data, again, set), where))
    elif planned.prepared.summary.rejected:
        reading = {key: given[key] for key in ("base", "encoding", "field_map")}
        show_next((flags.command("check", data, reading, None), "every rejected row, with its fix"))
    if not explained:
        show_next((details, ""), title="details")
