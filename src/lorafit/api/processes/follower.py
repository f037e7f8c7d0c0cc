"""follower: the processes of a run besides process 0, which train with it and write nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lorafit.api.manifest import Manifest
from lorafit.api.plan import PlannedRun
from lorafit.api.settings import template_for
from lorafit.backbone import redirect_library_logs
from lorafit.config import Resolved
from lorafit.data import prepare
from lorafit.errors import TrainingError
from lorafit.findings import Finding
from lorafit.planning import Plan
from lorafit.runs import RunDir, RunIdentity, RunLock
from lorafit.training import deterministic
from lorafit.training.distributed import Processes


@dataclass(frozen=True)
class Lead:
    """Hold the run that process 0 sends to the others once it is planned.

    Attributes:
        run: the run directory, on a disk that all processes see.
        run_id: the id that its checkpoints carry.
        known: the identity of a resumed run; None for a new one.
        resolved: the settings, with the plan's values.
        plan: the plan.
        rows: the hashes of the training and the held-out rows.
    """

    run: Path
    run_id: str
    known: RunIdentity | None
    resolved: Resolved
    plan: Plan
    rows: tuple[str, str]

    @classmethod
    def of(cls, manifest: Manifest) -> Lead:
        """Return the parts of `manifest` that the others need."""
        data = manifest.planned.prepared
        rows = (data.train.content_hash, data.holdout.content_hash)
        run = manifest.run.path.absolute()
        return cls(run, manifest.run_id, manifest.known, manifest.resolved, manifest.planned.plan, rows)


class Follower(Manifest):
    """Stand for the run in a process that writes nothing: process 0 watches over the folder."""

    def require_folder(self) -> None:
        """Do nothing."""

    def require_whole(self, *more: Path) -> None:
        """Do nothing."""

    def findings_with(self, own: list[Finding]) -> list[Finding]:
        """Return all findings, without writing them."""
        return [*self.findings, *own]


@contextlib.contextmanager
def following(processes: Processes) -> Iterator[Follower]:
    """Wait for the plan of process 0, read the same rows, and yield the run.

    The rows come from the cache that process 0 has filled, or from the files on another machine. Raises TrainingError
    if they are other rows.
    """
    lead = processes.from_main(_never)
    config = lead.resolved.config
    with redirect_library_logs(), deterministic(config.deterministic):
        template = template_for(lead.resolved)
        data = prepare(config, template)
        if (data.train.content_hash, data.holdout.content_hash) != lead.rows:
            raise TrainingError(
                f"process {processes.rank} reads other rows than process 0",
                where=config.data[0],
                fix="give every machine the same data files",
            )
        run, planned = RunDir(lead.run), PlannedRun(lead.plan, lead.resolved, data)
        yield Follower(run, RunLock(run.path), lead.run_id, lead.known, planned, template, [*lead.plan.findings])


def _never() -> Lead:
    raise AssertionError("process 0 follows no other")
