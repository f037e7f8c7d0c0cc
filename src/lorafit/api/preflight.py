"""preflight: find problems before a run starts, all at once."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

from lorafit.api.plan import PlannedRun
from lorafit.backbone import base_damages
from lorafit.config import RunConfig, base_folder
from lorafit.data.new_tokens.grown_base import GrownBase
from lorafit.errors import BackboneError, LorafitError, PlanError, RunDirError
from lorafit.export import DEFAULT_FORMAT, format_named
from lorafit.findings import Finding, Severity
from lorafit.hardware import Hardware
from lorafit.objectives import maker_of
from lorafit.runs import RunDir

MADE = datetime(2026, 1, 1, tzinfo=UTC).timestamp()
"""No run of this code is older than this."""
CLOCK_SLACK_S = 86_400.0
SPARE_BYTES = 16 << 20
"""Bytes for logs, metrics and JSON."""
MIB = 1 << 20
KINDS: dict[str, type[LorafitError]] = {"S001": BackboneError, "S002": RunDirError}


def before_reading(config: RunConfig, run: RunDir) -> list[Finding]:
    """Return the findings that need neither data nor plan.

    The checks are the files of a local base, the output folder and the clock. Raises UsageError for an objective that
    cannot be loaded.
    """
    maker_of(config.objective)
    local = Path(config.base).expanduser()
    return [
        *(_base_files(local) if local.is_dir() else ()),
        *_writable(run.path),
        *_clock([*map(Path, config.data)]),
    ]


def before_loading(planned: PlannedRun, run: RunDir, gpu_is_usable: Callable[[], bool]) -> list[Finding]:
    """Return the findings that need the plan.

    The checks are the files of a base from the hub, space for checkpoints and an export, and a usable GPU.
    """
    config = planned.resolved.config
    is_local = Path(config.base).expanduser().is_dir()
    return [
        *(() if is_local else _base_files(base_folder(config.base, config.revision, weights=True))),
        *_space(planned, run),
        *_gpu(planned.plan.hardware, gpu_is_usable),
    ]


def add_new_rows(config: RunConfig) -> None:
    """Write the weights of the base with its `new_tokens`, unless they are there. Raises BackboneError."""
    if not config.new_tokens:
        return
    grown = GrownBase.of(config.base, config.revision, config.new_tokens)
    if grown.has_weights:
        return
    for damage in base_damages(base_folder(grown.base, grown.revision, weights=True)):
        raise damage
    grown.add_weights()


def require_ready(findings: list[Finding]) -> None:
    """Raise one error that names every error among `findings`.

    It is a PlanError, or for a single finding the error class of its code.
    """
    errors = [finding for finding in findings if finding.severity is Severity.ERROR]
    if len(errors) == 1:
        (only,) = errors
        raise KINDS.get(only.code, PlanError)(only.message, where=only.where or only.code, fix=only.fix or None)
    if errors:
        sentences = "; ".join(f"({number}) {_sentence(finding)}" for number, finding in enumerate(errors, 1))
        raise PlanError(f"{len(errors)} findings stop this run: {sentences}")


def _sentence(finding: Finding) -> str:
    return LorafitError(finding.message, where=finding.where or finding.code, fix=finding.fix or None).sentence


def _base_files(folder: Path) -> Iterator[Finding]:
    for damage in base_damages(folder):
        yield Finding(
            "S001",
            Severity.ERROR,
            damage.what,
            where=damage.where or str(folder),
            why="a file of the base is damaged or missing",
            fix=damage.fix or "",
        )


def _writable(folder: Path) -> Iterator[Finding]:
    existing = _existing(folder)
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        what = "is no folder" if not existing.is_dir() else "cannot be written"
        yield Finding(
            "S002",
            Severity.ERROR,
            f"the run cannot be written to {folder}: {existing} {what}",
            where="out",
            why="checkpoints and the adapter go there",
            fix="choose another --out",
        )


def _clock(files: list[Path]) -> Iterator[Finding]:
    now = time.time()
    newest = max((path.stat().st_mtime for path in files if path.exists()), default=0.0)
    if now < MADE or now + CLOCK_SLACK_S < newest:
        seen = f"{datetime.fromtimestamp(now, UTC):%Y-%m-%d %H:%M} UTC"
        yield Finding(
            "S003",
            Severity.WARNING,
            f"the clock says {seen}, but this program or the data are newer",
            where="clock",
            why="downloads over TLS fail, and logs and trackers are dated wrongly; training itself does not use it",
            fix="set the clock",
        )


def _space(planned: PlannedRun, run: RunDir) -> Iterator[Finding]:
    config, inputs = planned.resolved.config, planned.plan.inputs
    free = shutil.disk_usage(_existing(run.path)).free
    each = inputs.checkpoint_bytes
    result = inputs.trained_parameters * inputs.width if inputs.is_full else 0
    saved = len(list(run.checkpoints.glob("step-*")))
    # a new checkpoint is complete before an old one is removed
    needed = each * max(config.keep_last + config.keep_best + 1 - saved, 1) + result + SPARE_BYTES
    if free < needed:
        yield Finding(
            "S004",
            Severity.ERROR,
            f"checkpoints need {needed / MIB:,.0f} MiB, but only {free / MIB:,.0f} MiB are free",
            where=str(run.path),
            why="a run that cannot save loses everything when it is interrupted",
            fix="free some space, choose another --out, or lower keep_last",
        )
    elif free < needed + _export_bytes(planned):
        yield Finding(
            "S004",
            Severity.WARNING,
            f"a merged model needs {_export_bytes(planned) / MIB:,.0f} MiB of further disk space",
            where=str(run.path),
            why="the run fits on the disk, but its export does not",
            fix="free some space before merge, or merge to another disk",
        )


def _export_bytes(planned: PlannedRun) -> float:
    """Return the bytes of a merged model in the default format."""
    return planned.plan.shape.parameters * format_named(DEFAULT_FORMAT).bytes_per_weight


def _gpu(hardware: Hardware, is_usable: Callable[[], bool]) -> Iterator[Finding]:
    if hardware.kind == "cuda" and not is_usable():
        yield Finding(
            "S005",
            Severity.ERROR,
            f"torch cannot use the {hardware.name}",
            where="GPU",
            why="the run would use the CPU, hundreds of times slower",
            fix="install a torch build for your driver, or hide the GPU (CUDA_VISIBLE_DEVICES=) to train on the CPU",
        )
    if hardware.kind == "cpu":
        for note in hardware.notes:
            yield Finding("S005", Severity.WARNING, note, where="GPU", fix="install torch with CUDA to train on it")


def _existing(path: Path) -> Path:
    """Return `path`, or the nearest parent folder that exists."""
    place = path.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    return place
