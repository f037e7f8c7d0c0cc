"""Observer: what a run tells whoever watches it. The command line draws it; the default watches in silence."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lorafit.adapters import Counts
    from lorafit.config import Resolved, RunDir
    from lorafit.data import Prepared
    from lorafit.data.progress import Progress as DataProgress
    from lorafit.planning import Plan
    from lorafit.training import StepProgress


class Observer:
    """Called at each stage of `train`, in this order. Override what you want to see."""

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

    def stepped(self, progress: StepProgress) -> None:
        """After each optimizer step."""
