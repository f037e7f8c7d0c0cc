"""Observer: the stages of a run, as callbacks. The command line draws them; the default ignores them."""

from __future__ import annotations

from typing import TYPE_CHECKING

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


class Observer:
    """Receive each stage of `train`, in this order. Override the methods you need."""

    def on_preflight(self, findings: list[Finding]) -> None:
        """Receive the preflight findings, before reading the data and before loading the base."""

    def on_reading(self, progress: DataProgress) -> None:
        """Receive the progress while data are read."""

    def on_data(self, prepared: Prepared) -> None:
        """Receive the data, read and judged."""

    def on_plan(self, plan: Plan, resolved: Resolved) -> None:
        """Receive the plan and the final settings."""

    def on_loading(self, run: RunDir) -> None:
        """Receive the run directory before the base is loaded and quantized."""

    def on_model(self, counts: Counts, base: str, rows: RowMode) -> None:
        """Receive the parameter counts. Adapters are attached, and `rows` is proved to keep rows apart."""

    def on_dry_run(self, dry_run: DryRun | None) -> None:
        """Receive the result of the dry run on the largest micro-batch, None without a GPU."""

    def on_step(self, progress: StepProgress) -> None:
        """Receive the progress after each optimizer step."""

    def on_event(self, event: RunEvent) -> None:
        """Receive an event besides steps: a spike, a step that was not applied, a retry."""

    def on_stopping(self, signal_number: int) -> None:
        """Receive SIGINT or SIGTERM; the run ends after this step.

        The method runs within the signal's handler, so it must not take locks.
        """
