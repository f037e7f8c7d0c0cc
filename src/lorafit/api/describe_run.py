"""What a run directory says of its run before the first step: settings, plan, findings, prompt, base, fingerprint."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from lorafit import __version__
from lorafit.api.plan import PlannedRun
from lorafit.backbone import base_fingerprint
from lorafit.config import RunConfig, RunDir, RunFingerprint, RunIdentity, base_folder, held_settings, write_text
from lorafit.data import Prepared, Record, Template
from lorafit.findings import Finding

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


def new_identity(planned: PlannedRun, template: Template, run_id: str) -> RunIdentity:
    """The id with the fingerprint of the planned run; reads and hashes the whole base."""
    fingerprint = fingerprint_of(planned.resolved.config, template, planned.prepared)
    return RunIdentity(run_id, fingerprint, environment())


def environment() -> dict[str, Any]:
    """What besides the fingerprint decides the last bits of a run: versions, the device, and threads on a CPU."""
    on_card = torch.cuda.is_available()
    here: dict[str, Any] = {name: version(name) for name in ("torch", "transformers", "peft", "bitsandbytes")}
    here["lorafit"] = __version__  # not the installed package's: a checkout on PYTHONPATH has none
    here["device"] = torch.cuda.get_device_name() if on_card else f"CPU ({torch.backends.cpu.get_cpu_capability()})"
    return here if on_card else here | {"threads": torch.get_num_threads()}


def describe(
    run: RunDir, identity: RunIdentity, planned: PlannedRun, template: Template, findings: list[Finding]
) -> None:
    """Write what describes the run; run.yaml last, since a folder with it holds a run."""
    for write in _parts(run, identity, planned, template, findings).values():
        write()
    run.write_json(run.identity, identity.to_dict())
    run.write_config(planned.resolved.config, {key: source.value for key, source in planned.resolved.sources.items()})


def describe_missing(
    run: RunDir, identity: RunIdentity, planned: PlannedRun, template: Template, findings: list[Finding]
) -> list[str]:
    """Write again what is gone of a run that goes on, whose content is proved to be the same; the files' names."""
    gone = {
        path: write for path, write in _parts(run, identity, planned, template, findings).items() if not path.exists()
    }
    for write in gone.values():
        write()
    return [path.name for path in gone]


def _parts(
    run: RunDir, identity: RunIdentity, planned: PlannedRun, template: Template, findings: list[Finding]
) -> dict[Path, Callable[[], None]]:
    """What describes the run besides its settings and its identity: each file, and what writes it."""
    config, content = planned.resolved.config, identity.fingerprint.base
    base = {"base": config.base, "revision": config.revision, "fingerprint": content}
    return {
        run.plan: lambda: run.write_json(run.plan, planned.plan.to_dict()),
        run.findings: lambda: run.write_json(run.findings, [finding.to_dict() for finding in findings]),
        run.template: lambda: template.save(run.template),
        run.samples: lambda: _write_samples(run, planned.prepared),
        run.base: lambda: run.write_json(run.base, base),
    }


def _write_samples(run: RunDir, prepared: Prepared) -> None:
    sample = prepared.holdout if len(prepared.holdout) else prepared.train
    records = [sample.record(index) for index in range(min(len(sample), SAMPLE_ROWS))]
    write_text(run.samples, "".join(_sample_line(record) for record in records))


def _sample_line(record: Record) -> str:
    sample: dict[str, Any] = {"messages": record.messages(), "source": record.source}
    if record.tools:
        sample["tools"] = [dict(tool) for tool in record.tools]
    return json.dumps(sample, ensure_ascii=False) + "\n"
