"""ReadyRun: a run that is read, judged and planned, and has all that training needs but the model."""

from __future__ import annotations

from dataclasses import dataclass

from lorafit.api.describe_run import describe, describe_again, new_identity
from lorafit.api.plan import PlannedRun
from lorafit.config import Resolved
from lorafit.data import Template
from lorafit.findings import Finding
from lorafit.runs import RunDir, RunIdentity, RunLock


@dataclass(frozen=True)
class ReadyRun:
    """A run whose folder this process has locked. `known` is the identity of a run that goes on, None of a new one."""

    run: RunDir
    lock: RunLock
    run_id: str
    known: RunIdentity | None
    planned: PlannedRun
    template: Template
    findings: list[Finding]

    @property
    def resolved(self) -> Resolved:
        """The settings, with what was planned."""
        return self.planned.resolved

    def identity(self) -> RunIdentity:
        """What the run is trained from. For a new run the whole base is read and hashed."""
        return self.known or new_identity(self.planned, self.template, self.run_id)

    def describe(self, identity: RunIdentity) -> list[str]:
        """Write what describes a new run into its folder, or what of it is gone; the names of that."""
        if self.known is not None:
            return self.describe_again(identity)
        describe(self.run, identity, self.planned, self.template, self.findings)
        return []

    def describe_again(self, identity: RunIdentity) -> list[str]:
        """Write what has gone from the folder; the files' names."""
        return describe_again(self.run, identity, self.planned, self.template, self.findings)

    def findings_with(self, own: Finding | None) -> list[Finding]:
        """The findings and what the run itself found, written down where there is such a thing."""
        if own is None:
            return self.findings
        self.run.write_json(self.run.findings, [finding.to_dict() for finding in [*self.findings, own]])
        return [*self.findings, own]
