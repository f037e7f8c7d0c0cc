"""What a run directory says of its run before the first step: settings, plan, findings, prompt, base, fingerprint."""

from __future__ import annotations

import filecmp
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
from lorafit.data.checks.whole_set import write_split
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
    for path, write in _parts(run, identity, planned, template, findings).items():
        write(path)


def describe_again(
    run: RunDir, identity: RunIdentity, planned: PlannedRun, template: Template, findings: list[Finding]
) -> list[str]:
    """Write again what of it is gone, and which rows were held out; the files' names."""
    parts = _split(run, planned.prepared) | _parts(run, identity, planned, template, findings)
    gone = {path: write for path, write in parts.items() if not path.exists()}
    for path, write in gone.items():
        write(path)
    return [path.name for path in gone]


def mend(run: RunDir, identity: RunIdentity, config: RunConfig, template: Template, prepared: Prepared) -> list[str]:
    """Write again what other verbs rely on and is gone or damaged, for a run whose content is proved the same, and
    which rows were held out where that is gone. Returns the files' names.
    """
    parts = _relied_on(run, identity, config, template, prepared)
    parts |= {path: write for path, write in _split(run, prepared).items() if not path.exists()}
    return [path.name for path, write in parts.items() if _is_written_again(path, write)]


def _is_written_again(path: Path, write: Callable[[Path], None]) -> bool:
    staged = path.with_name(f".{path.name}.staged")
    write(staged)
    if path.is_file() and filecmp.cmp(path, staged, shallow=False):
        staged.unlink()
        return False
    staged.replace(path)
    return True


def _parts(
    run: RunDir, identity: RunIdentity, planned: PlannedRun, template: Template, findings: list[Finding]
) -> dict[Path, Callable[[Path], None]]:
    """All that describes the run: each file, and what writes it; run.yaml last."""
    config = planned.resolved.config
    sources = {key: source.value for key, source in planned.resolved.sources.items()}
    return {
        **_relied_on(run, identity, config, template, planned.prepared),
        **_reports(run, planned, findings),
        run.identity: lambda path: run.write_json(path, identity.to_dict()),
        run.settings: lambda _: run.write_config(config, sources),
    }


def _split(run: RunDir, prepared: Prepared) -> dict[Path, Callable[[Path], None]]:
    """Which rows were held out; a new run has it from `prepare`."""
    return {run.split: lambda path: write_split(path, prepared.train, prepared.holdout)}


def _relied_on(
    run: RunDir, identity: RunIdentity, config: RunConfig, template: Template, prepared: Prepared
) -> dict[Path, Callable[[Path], None]]:
    """What `chat` and `merge` read besides settings, identity and adapter: each file, and what writes it."""
    base = {"base": config.base, "revision": config.revision, "fingerprint": identity.fingerprint.base}
    return {
        run.template: template.save,
        run.samples: lambda path: _write_samples(path, prepared),
        run.base: lambda path: run.write_json(path, base),
    }


def _reports(run: RunDir, planned: PlannedRun, findings: list[Finding]) -> dict[Path, Callable[[Path], None]]:
    """What people read: each file, and what writes it."""
    return {
        run.plan: lambda path: run.write_json(path, planned.plan.to_dict()),
        run.findings: lambda path: run.write_json(path, [finding.to_dict() for finding in findings]),
    }


def _write_samples(path: Path, prepared: Prepared) -> None:
    sample = prepared.holdout if len(prepared.holdout) else prepared.train
    records = [sample.record(index) for index in range(min(len(sample), SAMPLE_ROWS))]
    write_text(path, "".join(_sample_line(record) for record in records))


def _sample_line(record: Record) -> str:
    sample: dict[str, Any] = {"messages": record.messages(), "source": record.source}
    if record.tools:
        sample["tools"] = [dict(tool) for tool in record.tools]
    return json.dumps(sample, ensure_ascii=False) + "\n"
