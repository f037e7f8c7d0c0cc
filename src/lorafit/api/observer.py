"""Observer: what a run tells whoever watches it. The command line draws it; the default watches in silence."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lorafit.config import Resolved
    from lorafit.data import Prepared
    from lorafit.data.summary import Progress as DataProgress
    from lorafit.engine import DryRun
    from lorafit.findings import Finding
    from lorafit.methods.lora import Counts
    from lorafit.planning import Plan
    from lorafit.runs import RunDir
    from lorafit.training import RunEvent, StepProgress


class Observer:
    """Called at each stage of `train`, in this order. Override what you want to see."""

    def on_preflight(self, findings: list[Finding]) -> None:
        """What stands in the way of the run, or might: before the data are read, and again before the base is."""

    def on_reading(self, progress: DataProgress) -> None:
        """While the data are read."""

    def on_data(self, prepared: Prepared) -> None:
        """The data are read and judged."""

    def on_plan(self, plan: Plan, resolved: Resolved) -> None:
        """The plan is made, and every setting is settled."""

    def on_loading(self, run: RunDir) -> None:
        """The base is about to be loaded and quantised."""

    def on_model(self, counts: Counts, base: str) -> None:
        """Adapters are on the frozen base, and packed rows are proved isolated."""

    def on_dry_run(self, dry_run: DryRun | None) -> None:
        """The largest micro-batch has been run once on the GPU (None: there is no GPU, and nothing to try)."""

    def on_step(self, progress: StepProgress) -> None:
        """After each optimizer step."""

    def on_event(self, event: RunEvent) -> None:
        """When something besides a step happened: a spike, a step that was not applied, a retry."""

    def on_stopping(self, signal_number: int) -> None:
        """SIGINT or SIGTERM has come: the run ends after this step. Called within the signal's handler: no locks."""
