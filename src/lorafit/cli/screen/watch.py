"""watch: the display of a run as it happens.

A terminal has a live line, other outputs a line from time to time, and machines JSON events.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from rich.markup import escape
from rich.progress import Progress, TextColumn
from rich.text import Text

from lorafit.api.observer import Observer
from lorafit.cli.screen.console import PEOPLE, duration, gib, heading, loss, show_settings, without_infinities
from lorafit.cli.screen.data_view import ReadingBar, show_summary
from lorafit.cli.screen.findings_view import show_findings
from lorafit.cli.screen.plan_view import show_choices, show_verdict

if TYPE_CHECKING:
    from lorafit.config import Resolved
    from lorafit.data import Prepared
    from lorafit.data.summary import Progress as DataProgress
    from lorafit.engine import DryRun, RowMode
    from lorafit.findings import Finding
    from lorafit.methods.lora import Counts
    from lorafit.planning import Plan
    from lorafit.runs import RunDir
    from lorafit.training import RunEvent, StepProgress

LINE_S = 30.0
"""Seconds between two lines of progress without a terminal."""
BAR = 16


class ConsoleObserver(Observer):
    """Print each stage as it ends. Use it as a context manager, so that errors remove the bars.

    `data` are the files, and the flags that say how to read them, as typed.
    """

    def __init__(self, data: Sequence[str] = ()) -> None:
        self.data = data
        self.bar = ReadingBar()
        self.progress = Progress(
            TextColumn("{task.fields[seen]}"), console=PEOPLE, transient=True, disable=not PEOPLE.is_terminal
        )
        self.last_line_s = float("-inf")
        self.task = self.progress.add_task("train", total=1, seen="", visible=False)
        self.has_dry_run = self.trains_all = self.quantizes = False
        self.last_eval_loss: float | None = None
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

    def on_preflight(self, findings: list[Finding]) -> None:
        show_findings(findings)

    def on_reading(self, progress: DataProgress) -> None:
        self.bar.show(progress)

    def on_data(self, prepared: Prepared) -> None:
        self.bar.__exit__()
        heading("data")
        show_summary(prepared.summary)
        show_findings(prepared.findings, self.data)

    def on_plan(self, plan: Plan, resolved: Resolved) -> None:
        self.has_dry_run, self.trains_all = plan.hardware.kind == "cuda", plan.decided.is_full
        self.quantizes = resolved.config.quantization != "none"
        show_verdict(plan, [*plan.findings])
        show_choices(plan, resolved)
        show_findings(plan.findings)
        heading("settings", "[dim]only set or planned ones; run.yaml has all[/dim]")
        show_settings([row for row in resolved.table() if row[2] != "default"], resolved.names)

    def on_loading(self, run: RunDir) -> None:
        self.run = run
        if self.status:
            self.status.start()

    def on_model(self, counts: Counts, base: str, rows: RowMode) -> None:
        if self.status:
            self.status.stop()
        state = "every weight trains" if self.trains_all else "frozen"
        heading("quantize" if self.quantizes else "load", f"{Path(base).name}, {state}; {escape(rows.in_words)}")
        heading(
            "train" if self.trains_all else "attach",
            f"[bold]{counts.trainable:,}[/bold] trainable of {counts.total:,} parameters "
            f"([bold]{counts.percent:.3f} %[/bold])",
        )
        if self.has_dry_run and self.status:
            self.status.update("compiling, then a dry run of the largest micro-batch")
            self.status.start()

    def on_dry_run(self, dry_run: DryRun | None) -> None:
        if self.status:
            self.status.stop()
        if dry_run is not None:
            heading(
                "dry run",
                f"[bold]{gib(dry_run.peak_bytes)}[/bold] of {gib(dry_run.budget_bytes)} on the largest "
                f"micro-batch, memory policy {dry_run.policy}; {duration(dry_run.elapsed_s)}, "
                f"{duration(dry_run.compile_s)} of them compiling",
            )
        self.progress.start()

    def on_step(self, progress: StepProgress) -> None:
        is_last = progress.step == progress.steps
        is_evaluated = progress.eval_loss != self.last_eval_loss and progress.eval_loss is not None
        self.last_eval_loss = progress.eval_loss
        if is_last:
            self.progress.stop()
        elif PEOPLE.is_terminal:
            self.progress.update(self.task, seen=_live_line(progress, PEOPLE.width), visible=True)
            return
        if is_last or is_evaluated or time.monotonic() - self.last_line_s >= LINE_S:
            self.last_line_s = time.monotonic()
            heading("train", "  ".join(_parts(progress, with_eval=is_evaluated)))

    def on_event(self, event: RunEvent) -> None:
        heading("event", f"[yellow]{escape(event.message)}[/yellow]")

    def on_stopping(self, signal_number: int) -> None:
        if signal_number != signal.SIGINT:  # nobody pressed a key; a launcher sends SIGTERM when another process died
            return
        # written directly, since the interrupted code may hold rich's locks
        with contextlib.suppress(OSError):  # the terminal is gone
            os.write(2, b"\nstopping after this step, with a checkpoint; press Ctrl-C again to end at once\n")


class JsonObserver(Observer):
    """Write one JSON object a line to standard error for each stage, step and event."""

    def on_preflight(self, findings: list[Finding]) -> None:
        self._write("ready", findings=[finding.to_dict() for finding in findings])

    def on_data(self, prepared: Prepared) -> None:
        summary = prepared.summary
        counts = {"read": summary.read, "kept": summary.kept, "rejected": summary.rejected}
        self._write("checked", **counts, train_rows=summary.train_rows, held_out_rows=summary.holdout_rows)

    def on_plan(self, plan: Plan, resolved: Resolved) -> None:
        self._write("planned", method=plan.method, steps=plan.steps, peak_bytes=plan.memory.peak_bytes)

    def on_loading(self, run: RunDir) -> None:
        self._write("loading", run=str(run.path))

    def on_model(self, counts: Counts, base: str, rows: RowMode) -> None:
        self._write(
            "attached", trainable_parameters=counts.trainable, total_parameters=counts.total, rows=rows.in_words
        )

    def on_step(self, progress: StepProgress) -> None:
        self._write("step", **asdict(progress))

    def on_event(self, event: RunEvent) -> None:
        self._write("event", **event.to_dict())

    def _write(self, event: str, /, **fields: Any) -> None:
        with contextlib.suppress(OSError):  # the reader is gone
            line = json.dumps({"event": event, **without_infinities(fields)}, ensure_ascii=False)
            print(line, file=sys.stderr, flush=True)


def _parts(progress: StepProgress, *, with_eval: bool) -> list[str]:
    """Return the parts of a step's line, the most important first."""
    parts = [f"step {progress.step}/{progress.steps}", f"loss [bold]{loss(progress.loss)}[/bold]"]
    if with_eval and progress.eval_loss is not None:
        parts.append(f"held-out {loss(progress.eval_loss)}")
    if progress.step < progress.steps:
        parts.append(f"{duration(progress.eta_s)} left")
    return [*parts, f"{progress.tokens_per_s:,.0f} tok/s", gib(progress.memory_bytes)]


def _live_line(progress: StepProgress, width: int) -> str:
    """Return the step as one line of at most `width` columns.

    Parts that do not fit are left out from the end.
    """
    line = "[bold]train[/bold]    "
    for part in _parts(progress, with_eval=True):
        if len(Text.from_markup(f"{line} {part} ")) >= width:
            return line
        line += f" {part} "
    if len(Text.from_markup(line)) + BAR + 1 < width:
        done = round(BAR * progress.step / max(progress.steps, 1))
        line += f" [cyan]{'━' * done}[/cyan][dim]{'━' * (BAR - done)}[/dim]"
    return line
