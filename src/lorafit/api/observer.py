"""Observer: what a run tells whoever watches it. The command line draws it; the default watches in silence."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lorafit.adapters import Counts
    from lorafit.config import Resolved, RunDir
    from lorafit.data import Prepared
    from lorafit.data.summary import Progress as DataProgress
    from lorafit.engine import Rehearsal
    from lorafit.findings import Finding
    from lorafit.planning import Plan
    from lorafit.training import RunEvent, StepProgress


class Observer:
    """Called at each stage of `train`, in this order. Override what you want to see."""

    def ready(self, findings: list[Finding]) -> None:
        """What stands in the way of the run, or might: before the data are read, and again before the base is."""

    def reading(self, progress: DataProgress) -> None:
        """While the data are read."""

    def checked(self, prepared: Prepared) -> None:
        """The data are read and judged."""

    def planned(self, plan: Plan, resolved: Resolved) -> None:
        """The plan is made, and every setting is settled."""

    def loading(self, run: RunDir) -> None:
        """The base is about to be loaded and quantised."""

    def attached(self, counts: Counts, base: str) -> None:
        """Adapters are on the frozen base, and packed rows are proved isolated."""

    def rehearsed(self, rehearsal: Rehearsal | None) -> None:
        """The largest micro-batch has been run once on the card (None: there is no card, and nothing to rehearse)."""

    def stepped(self, progress: StepProgress) -> None:
        """After each optimizer step."""

    def happened(self, event: RunEvent) -> None:
        """When something besides a step happened: a spike, a step that was not applied, a retry."""

    def stopping(self, signal_number: int) -> None:
        """SIGINT or SIGTERM has come: the run ends after this step. Called within the signal's handler: no locks."""
