"""train: data and a base in, a run directory with a proved-loadable adapter out."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from lorafit.api.describe_run import fingerprint_of, mend, new_run_id
from lorafit.api.early_signals import EarlySignals
from lorafit.api.existing_run import OtherRows, Place, begin_anew, find_place, next_free, put_back
from lorafit.api.fitting import fit
from lorafit.api.going_on import known_identity, refuse_at_end
from lorafit.api.observer import Observer
from lorafit.api.plan import plan_prepared
from lorafit.api.preflight import before_loading, before_reading, require_ready
from lorafit.api.ready_run import ReadyRun
from lorafit.api.settings import require_base, require_data, settle, template_for
from lorafit.api.trained_run import TrainedRun
from lorafit.backbone import redirect_library_logs
from lorafit.config import Resolved, RunConfig, RunDir, RunIdentity, RunLock
from lorafit.data import Prepared, Template, prepare, require_clean
from lorafit.errors import RunDirError, UsageError
from lorafit.findings import Finding
from lorafit.planning import hardware_here
from lorafit.training import EventLog, deterministic
from lorafit.training.trainer_library import TrainerCallback, get_available_reporting_integrations


def train(
    data: Sequence[str | Path] | str | Path | None = None,
    /,
    base: str | Path | None = None,
    *,
    out: str | Path | None = None,
    restart: bool = False,
    observer: Observer | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    **settings: Any,
) -> TrainedRun:
    """Train LoRA adapters for `data` on the frozen `base`; `settings` are keys of RunConfig.

    `data` may be a recipe YAML. A folder that holds an unfinished run of the same settings and data goes on with it,
    from the newest checkpoint that verifies, to the bits it would have had; `restart` moves that run aside instead.
    Nothing is left behind by a run that could not start. Raises LorafitError subclasses, each one sentence:
    TrainingStopped after SIGINT or SIGTERM, RunFinished when there is nothing left to train.
    """
    watch = observer or Observer()
    resolved = settle(data, {**settings, "base": base, "out": str(out) if out else None})
    require_data(resolved)
    require_base(resolved)
    _require_one_process_here(resolved)
    with EarlySignals() as signals:
        place = find_place(resolved, restart=restart)
        signals.run = place.run
        aside = begin_anew(place.run) if restart else None
        try:
            return _train_at(place, resolved, watch, list(callbacks))
        except OtherRows:
            fresh = Place(next_free(resolved), goes_on=False, is_named=False)
            signals.run = fresh.run
            return _train_at(fresh, resolved, watch, list(callbacks))
        except BaseException:
            put_back(aside, place.run)
            raise


def _train_at(place: Place, resolved: Resolved, watch: Observer, callbacks: list[TrainerCallback]) -> TrainedRun:
    """Train in `place`, locked. Raises OtherRows when a finished run of other rows is there, and nobody named it."""
    run, is_new = place.run, not place.run.path.exists()
    early = before_reading(resolved.config, run)
    watch.ready(early)
    require_ready(early)
    run.require_writable()
    with (
        _no_empty_folder(run, is_new),
        RunLock(run.path) as lock,
        redirect_library_logs(run.log),
        deterministic(resolved.config.deterministic),
    ):
        try:
            if run.holds_run != place.goes_on:
                raise RunDirError("another process has just used this folder", where=str(run.path), fix="run it again")
            return fit(_make_ready(place, lock, place.settled(resolved), early, watch), watch, callbacks)
        except BaseException:
            _leave_nothing(run, is_new and lock.is_held)
            raise


def _make_ready(place: Place, lock: RunLock, resolved: Resolved, early: list[Finding], watch: Observer) -> ReadyRun:
    """Read and judge the data, and plan the run; `early` is what was found before."""
    run, template = place.run, template_for(resolved)
    # a run that goes on has its split and its rejected rows already
    prepared = prepare(
        resolved.config, template, run_dir=None if place.goes_on else run.path, on_progress=watch.reading
    )
    watch.checked(prepared)
    require_clean(prepared)
    known = _mended(place, resolved.config, template, prepared, watch) if place.goes_on else None
    planned = plan_prepared(resolved, prepared, hardware_here(resolved.config))
    watch.planned(planned.plan, planned.resolved)
    late = before_loading(planned, run, torch.cuda.is_available)
    watch.ready(late)
    require_ready([*planned.plan.findings, *late])
    findings = [*early, *prepared.findings, *planned.plan.findings, *late]
    return ReadyRun(run, lock, known.run if known else new_run_id(), known, planned, template, findings)


def _mended(place: Place, config: RunConfig, template: Template, prepared: Prepared, watch: Observer) -> RunIdentity:
    """The identity of the run that goes on, whose files are whole again. Raises RunFinished when it is at its end."""
    run = place.run
    identity = known_identity(place, config, fingerprint_of(config, template, prepared))
    run.follow_files(config)
    names = mend(run, identity, config, template, prepared)
    if names:
        message = f"{', '.join(names)} in {run.path} was missing or not as it should be, and is written again"
        EventLog(run.events, watch.happened).record("described_again", 0, message)
    refuse_at_end(run, identity)
    return identity


@contextlib.contextmanager
def _no_empty_folder(run: RunDir, is_new: bool) -> Iterator[None]:
    """A new folder in which nothing could be written does not stay."""
    try:
        yield
    except BaseException:
        if is_new:
            with contextlib.suppress(OSError):
                run.path.rmdir()  # refused where anything is in it
        raise


def _require_one_process_here(resolved: Resolved) -> None:
    """UsageError for what this path cannot do yet, before anything is written."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("train runs in one process", where="WORLD_SIZE", fix="start it without torchrun")
    if resolved.config.gpu:
        raise UsageError(
            "train runs on the hardware that is here", where="gpu", fix="use gpu with plan, vram with train"
        )
    trackers = get_available_reporting_integrations()
    unknown = [name for name in resolved.config.report_to if name not in trackers]
    if unknown:
        here = ", ".join(trackers) or "none"
        raise UsageError(f"no tracker '{unknown[0]}' is installed", where="report_to", fix=f"installed are: {here}")


def _leave_nothing(run: RunDir, is_own: bool) -> None:
    """Remove the folder that a run made which never started, unless it explains which rows were rejected."""
    if is_own and not run.settings.exists() and not (run.path / "rejected.jsonl").exists():
        shutil.rmtree(run.path, ignore_errors=True)
