"""Manifest: what a run directory says of its run: settings, plan, findings, prompt, base, fingerprint."""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from lorafit import __version__
from lorafit.api.plan import PlannedRun
from lorafit.backbone import base_fingerprint
from lorafit.config import Resolved, RunConfig, base_folder
from lorafit.data import Prepared, Record, Template
from lorafit.data.checks.whole_set import write_split
from lorafit.errors import RunDirError
from lorafit.findings import Finding
from lorafit.runs import RunDir, RunFingerprint, RunIdentity, RunLock, held_settings, write_text

SAMPLE_ROWS = 256  # held-out rows kept in the run directory, for merge's verification and for a look


def fingerprint_of(config: RunConfig, template: Template, prepared: Prepared) -> RunFingerprint:
    """What a run of these settings over these rows is trained from; `config` as the plan settled it."""
    return RunFingerprint(
        train_rows=prepared.train.content_hash,
        held_out_rows=prepared.holdout.content_hash,
        template=template.sha256,
        base=base_fingerprint(base_folder(config.base, config.revision, weights=True)),
        settings=held_settings(config),
    )


def new_run_id() -> str:
    """A fresh id."""
    return uuid.uuid4().hex


def environment() -> dict[str, Any]:
    """What besides the fingerprint decides the last bits of a run: versions, the device, and threads on a CPU."""
    on_card = torch.cuda.is_available()
    here: dict[str, Any] = {name: version(name) for name in ("torch", "transformers", "peft", "bitsandbytes")}
    here["lorafit"] = __version__  # not the installed package's: a checkout on PYTHONPATH has none
    here["device"] = torch.cuda.get_device_name() if on_card else f"CPU ({torch.backends.cpu.get_cpu_capability()})"
    return here if on_card else here | {"threads": torch.get_num_threads()}


@dataclass(frozen=True)
class Manifest:
    """A run that is read, judged and planned, and what its folder says of it.

    Attributes:
        run: the folder, which `lock` holds.
        run_id: what its checkpoints know it by.
        known: the identity of a run that is resumed; None of a new one.
    """

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
        """Return what the run is trained from. For a new run the whole base is read and hashed."""
        if self.known is not None:
            return self.known
        fingerprint = fingerprint_of(self.resolved.config, self.template, self.planned.prepared)
        return RunIdentity(self.run_id, fingerprint, environment())

    def write(self, identity: RunIdentity) -> None:
        """Write what describes the run; run.yaml last, since a folder with it holds a run.

        A resumed run keeps its run.yaml and its identity.
        """
        self.lock.hold()  # loading takes minutes
        config = self.resolved.config
        write_relied_on(self.run, identity, config, self.template, self.planned.prepared)
        self.run.write_json(self.run.plan, self.planned.plan.to_dict())
        self._write_findings(self.findings)
        if self.known is None:
            self.run.write_json(self.run.identity, identity.to_dict())
            sources = {key: source.value for key, source in self.resolved.sources.items()}
            self.run.write_config(config, sources)

    def require_place(self) -> None:
        """Raise RunDirError when the folder is gone, or another process's by now: a step ends with that."""
        if not self.lock.is_held:
            raise RunDirError(
                "the run's folder was removed or taken while it trained",
                where=str(self.run.path),
                fix="leave the folder alone, and give the same command again",
            )

    def require_whole(self, *more: Path) -> None:
        """Raise RunDirError when a file that other verbs need is gone from the folder: a checkpoint ends with that."""
        self.require_place()
        run = self.run
        needed = (run.settings, run.identity, run.template, run.samples, run.base, *more)
        gone = [str(path.relative_to(run.path)) for path in needed if not path.is_file()]
        if gone:
            raise RunDirError(
                f"{', '.join(gone)} of this run went while it trained",
                where=str(run.path),
                fix="leave the folder alone, and give the same command again",
            )

    def findings_with(self, own: Finding | None) -> list[Finding]:
        """Return the findings and what the run itself found, and write that down where there is such a thing."""
        if own is None:
            return self.findings
        self._write_findings([*self.findings, own])
        return [*self.findings, own]

    def _write_findings(self, findings: list[Finding]) -> None:
        self.run.write_json(self.run.findings, [finding.to_dict() for finding in findings])


def write_relied_on(
    run: RunDir, identity: RunIdentity, config: RunConfig, template: Template, prepared: Prepared
) -> None:
    """Write what `chat` and `merge` read besides settings, identity and adapter, and which rows were held out."""
    if not run.split.exists():
        write_split(run.split, prepared.train, prepared.holdout)
    template.save(run.template)
    sample = prepared.holdout if len(prepared.holdout) else prepared.train
    records = [sample.record(index) for index in range(min(len(sample), SAMPLE_ROWS))]
    write_text(run.samples, "".join(_sample_line(record) for record in records))
    base = {"base": config.base, "revision": config.revision, "fingerprint": identity.fingerprint.base}
    run.write_json(run.base, base)


def _sample_line(record: Record) -> str:
    sample: dict[str, Any] = {"messages": record.messages(), "source": record.source}
    if record.tools:
        sample["tools"] = [dict(tool) for tool in record.tools]
    return json.dumps(sample, ensure_ascii=False) + "\n"
