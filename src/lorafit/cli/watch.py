"""ConsoleObserver: a run as it happens, on the terminal or as plain lines."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn

from lorafit.api.observer import Observer
from lorafit.cli.console import PEOPLE, duration, gib, heading, loss, show_findings, show_settings
from lorafit.cli.data_view import ReadingBar, show_summary
from lorafit.cli.plan import show_plan

if TYPE_CHECKING:
    from lorafit.adapters import Counts
    from lorafit.config import Resolved, RunDir
    from lorafit.data import Prepared
    from lorafit.data.summary import Progress as DataProgress
    from lorafit.engine import Rehearsal
    from lorafit.findings import Finding
    from lorafit.planning import Plan
    from lorafit.training import RunEvent, StepProgress

PLAIN_LINES = 10  # lines of progress a whole run prints where there is no terminal


class ConsoleObserver(Observer):
    """Prints each stage as it ends; use it as a context manager so that the bars are taken down on errors."""

    def __init__(self) -> None:
        self.bar = ReadingBar()
        self.progress = Progress(
            TextColumn("[bold]train[/bold]    "),
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(24),
            TextColumn("{task.fields[seen]}"),
            console=PEOPLE,
            transient=True,
            disable=not PEOPLE.is_terminal,
        )
        self.task = self.progress.add_task("train", total=1, seen="", visible=False)
        self.rehearses = False
        self.status = PEOPLE.status("loading the base") if PEOPLE.is_terminal else None

    def __enter__(self) -> Self:
        self.bar.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.__exit__()
        self.progress.stop()
        if self.status:
            self.status.stop()

    def ready(self, findings: list[Finding]) -> None:
        show_findings(findings)

    def reading(self, progress: DataProgress) -> None:
        self.bar.show(progress)

    def checked(self, prepared: Prepared) -> None:
        self.bar.__exit__()
        heading("check")
        show_summary(prepared.summary)
        show_findings(prepared.findings)

    def planned(self, plan: Plan, resolved: Resolved) -> None:
        self.rehearses = plan.hardware.kind == "cuda"
        show_plan(plan)
        show_findings(plan.findings)
        heading("settings")
        show_settings(resolved.table())

    def loading(self, run: RunDir) -> None:
        self.run = run
        if self.status:
            self.status.start()

    def attached(self, counts: Counts, base: str) -> None:
        if self.status:
            self.status.stop()
        heading("quantise", f"{Path(base).name}, frozen; packed rows proved isolated from each other")
        heading(
            "attach",
            f"[bold]{counts.trainable:,}[/bold] trainable of {counts.total:,} parameters "
            f"([bold]{counts.percent:.3f} %[/bold])",
        )
        if self.rehearses and self.status:
            self.status.update("compiling, and rehearsing the largest micro-batch")
            self.status.start()

    def rehearsed(self, rehearsal: Rehearsal | None) -> None:
        if self.status:
            self.status.stop()
        if rehearsal is not None:
            heading(
                "rehearse",
                f"[bold]{gib(rehearsal.peak_bytes)}[/bold] of {gib(rehearsal.budget_bytes)} on the largest "
                f"micro-batch, activations {rehearsal.dial}; {duration(rehearsal.elapsed_s)}, "
                f"{duration(rehearsal.compile_s)} of them compiling",
            )
        self.progress.start()

    def stepped(self, progress: StepProgress) -> None:
        seen = (
            f"loss [bold]{loss(progress.loss)}[/bold]  {progress.tokens_per_s:,.0f} tok/s  "
            f"{gib(progress.memory_bytes)}  {duration(progress.eta_s)} left"
        )
        if progress.eval_loss is not None:
            seen += f"  held-out loss {loss(progress.eval_loss)}"
        self.progress.update(self.task, completed=progress.step, total=progress.steps, seen=seen, visible=True)
        last = progress.step == progress.steps
        if last:
            self.progress.stop()
        if last or (not PEOPLE.is_terminal and progress.step % max(1, progress.steps // PLAIN_LINES) == 0):
            heading("train", f"step {progress.step}/{progress.steps}  {seen}")

    def happened(self, event: RunEvent) -> None:
        heading("event", f"[yellow]{escape(event.message)}[/yellow]")

    def stopping(self, signal_number: int) -> None:
        # straight to the descriptor: rich holds locks that the interrupted code may hold too
        with contextlib.suppress(OSError):  # a terminal that is gone
            os.write(2, b"\nstopping after this step, with a checkpoint; Ctrl-C again ends at once\n")


def say_next(run: str, commands: list[tuple[str, str]]) -> None:
    """Where the run is, and what one would type next."""
    heading("run", f"[bold]{escape(run)}[/bold]")
    for command, purpose in commands:
        # left to the terminal to wrap: a command is there to be copied
        PEOPLE.print(f"  [cyan]{escape(command)}[/cyan]  [dim]{purpose}[/dim]", soft_wrap=True)
