"""train: train a run from its settings to its adapter."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lorafit.api.build_model import BuiltModel, build_model, tune_memory
from lorafit.api.manifest import (
    Manifest,
    describe_run,
    fingerprint_of,
    help_to_save,
    known_identity,
    layout_of,
    new_run_id,
    refuse_at_end,
    refuse_stopped,
    save_result,
    write_relied_on,
)
from lorafit.api.observer import Observer
from lorafit.api.plan import plan_prepared
from lorafit.api.preflight import add_new_rows, before_loading, before_reading, require_ready
from lorafit.api.processes.follower import Lead, following
from lorafit.api.settings import require_base, require_data, settle, template_for
from lorafit.backbone import redirect_library_logs, require_unchanged
from lorafit.config import Resolved, RunConfig
from lorafit.data import Prepared, Rows, Template, prepare, require_clean
from lorafit.errors import RunDirError, TrainingStopped, UsageError
from lorafit.export import follow_base
from lorafit.findings import Finding
from lorafit.hardware import hardware_here
from lorafit.methods.lora import Counts
from lorafit.runs import RunDir, RunIdentity, RunLock, best_step
from lorafit.runs.lookup import OtherRows, RunTarget, find_target, next_free, restore_run, set_run_aside
from lorafit.runs.signals import EarlySignals, StopSignals
from lorafit.training import (
    EventLog,
    MetricsLog,
    RunContext,
    TrainerCallback,
    TrainingLoop,
    deterministic,
    require_trackers,
)
from lorafit.training.distributed import Processes, joined


@dataclass(frozen=True)
class TrainedRun:
    """Hold a finished run.

    Attributes:
        run: the run directory.
        resolved: the settings.
        model: the live model.
        template: the chat template.
        train_rows: the rows trained on.
        held_out_rows: the rows held out.
        findings: all findings of the run.
        counts: trainable and total parameters.
        steps: optimizer steps.
        tokens: packed tokens that this process trained on.
        train_s: seconds of training.
        loss: the last step's loss; NaN without one.
        eval_loss: the last held-out loss, if it was measured.
        best: (step, held-out loss) of the checkpoint with the lowest loss, if it was measured.
    """

    run: RunDir
    resolved: Resolved
    model: Any
    template: Template
    train_rows: Rows
    held_out_rows: Rows
    findings: list[Finding]
    counts: Counts
    steps: int
    tokens: int
    train_s: float
    loss: float
    eval_loss: float | None = None
    best: tuple[int, float] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready mapping."""
        return {
            "run": str(self.run.path),
            "steps": self.steps,
            "train_rows": len(self.train_rows),
            "held_out_rows": len(self.held_out_rows),
            "loss": self.loss,
            "eval_loss": self.eval_loss,
            "best": {"step": self.best[0], "eval_loss": self.best[1]} if self.best else None,
            "train_s": round(self.train_s, 2),
            "tokens_per_s": round(self.tokens / max(self.train_s, 1e-9)),
            "trainable_parameters": self.counts.trainable,
            "total_parameters": self.counts.total,
            "findings": [finding.to_dict() for finding in self.findings],
        }


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
    """Train on `data`: adapters on the frozen `base`, or with `method="full"` every weight.

    `data` may be a recipe YAML; `settings` are keys of RunConfig. A folder with an unfinished run of the same settings
    and data resumes from its newest valid checkpoint, to the bits of an uninterrupted run. `restart` moves that run
    aside instead. A run that cannot start leaves no files.

    Raises LorafitError subclasses, each with one sentence: TrainingStopped after SIGINT or SIGTERM, RunFinished if
    nothing is left to train.
    """
    watch = observer or Observer()
    resolved = settle(data, {**settings, "base": base, "out": str(out) if out else None})
    require_data(resolved)
    require_base(resolved)
    _require_supported(resolved)
    with EarlySignals() as signals, joined() as processes:
        if not processes.is_main:
            return _follow(processes, list(callbacks))
        add_new_rows(resolved.config)
        participants = Participants(processes, watch, list(callbacks))
        target = find_target(resolved, restart=restart)
        signals.run = target.run
        try:
            with _old_run_aside(target.run, restart):
                return _train_in(target, resolved, participants)
        except OtherRows:
            fresh = RunTarget(next_free(resolved), resumes=False, is_named=False)
            signals.run = fresh.run
            return _train_in(fresh, resolved, participants)


@dataclass(frozen=True)
class Participants:
    """Hold the processes that train a run, and its watchers.

    Attributes:
        processes: the processes of the run, one without a launcher.
        watch: receives the stages; in other processes than 0 it shows nothing.
        callbacks: transformers' callbacks.
    """

    processes: Processes
    watch: Observer
    callbacks: list[TrainerCallback]


def _follow(processes: Processes, callbacks: list[TrainerCallback]) -> TrainedRun:
    """Train with process 0, and write nothing."""
    with following(processes) as manifest:
        built = processes.together(lambda: build_model(manifest.planned, is_new=False, world=processes.world))
        try:
            return _train_model(manifest, built, None, Participants(processes, Observer(), callbacks))
        except TrainingStopped:
            processes.wait_for_the_end_of_main()
            raise


def _train_in(target: RunTarget, resolved: Resolved, participants: Participants) -> TrainedRun:
    """Train in `target`. Raises OtherRows if an unnamed folder holds a finished run of other rows."""
    run, watch, processes = target.run, participants.watch, participants.processes
    early = before_reading(resolved.config, run)
    watch.on_preflight(early)
    require_ready(early)
    with _opened(target, resolved.config) as lock:
        settings, template = target.settled(resolved), template_for(resolved)
        # a resumed run already has its split and its rejected rows
        data = prepare(
            settings.config, template, run_dir=None if target.resumes else run.path, on_progress=watch.on_reading
        )
        watch.on_data(data)
        require_clean(data)
        known = _known(target, settings.config, template, data) if target.resumes else None
        planned = plan_prepared(settings, data, hardware_here(settings.config), processes.world)
        watch.on_plan(planned.plan, planned.resolved)
        late = before_loading(planned, run, torch.cuda.is_available)
        watch.on_preflight(late)
        require_ready([*planned.plan.findings, *late])
        findings = [*early, *data.findings, *planned.plan.findings, *late]
        run_id = known.run if known else new_run_id()
        manifest = Manifest(run, lock, run_id, known, planned, template, findings)
        processes.from_main(lambda: Lead.of(manifest))  # the other processes begin here
        watch.on_loading(run)
        identity = _in_background(manifest.identity)  # the base is hashed while it is loaded
        built = processes.together(lambda: build_model(planned, is_new=known is None, world=processes.world))
        watch.on_preflight(list(built.findings))
        findings.extend(built.findings)  # the manifest's own list
        watch.on_model(built.counts, settings.config.base, built.rows)
        return _train_model(manifest, built, identity, participants)


def _train_model(
    manifest: Manifest,
    built: BuiltModel,
    identity: Future[RunIdentity] | None,
    participants: Participants,
) -> TrainedRun:
    """Tune the memory, train to the end, and write the adapter. Raises TrainingStopped after a signal."""
    run, resolved, data = manifest.run, manifest.resolved, manifest.planned.prepared
    processes, watch = participants.processes, participants.watch
    events = EventLog(run.events if processes.is_main else None, watch.on_event, is_new=manifest.known is None)
    if built.note:
        events.record("whole_logits", 0, built.note)
    metrics = MetricsLog(run.metrics)
    with (
        tune_memory(built, resolved, data.train, run, events, processes) as (memory, dry_run),
        StopSignals(watch.on_stopping) as signals,
    ):
        watch.on_dry_run(dry_run)
        context = RunContext(
            run.checkpoints,
            manifest.run_id,
            processes,
            events,
            signals,
            callbacks=[*participants.callbacks, metrics],
            show=watch.on_step,
            before_write=manifest.require_folder,
            before_save=manifest.require_whole,
        )
        model = (built.model, built.method, built.objective)
        loop = TrainingLoop(*model, resolved.config, data.train, data.holdout, context, memory)
        layout = layout_of(resolved.config, memory, dry_run, processes.world)
        known, checkpoint = processes.from_main(lambda: describe_run(manifest, identity, layout, events))
        processes.keep_time()
        started = time.perf_counter()
        loop.run(checkpoint.folder if checkpoint else None)
        train_s = time.perf_counter() - started
        processes.together(partial(require_unchanged, built.model))
        own = _end(manifest, known, loop, metrics)
        return _result(manifest, built, loop, train_s, own)


def _end(manifest: Manifest, identity: RunIdentity, loop: TrainingLoop, metrics: MetricsLog) -> list[Finding]:
    """Save in process 0 while the others wait, and return the findings about it.

    Raises TrainingStopped in all processes if a signal ended the run early.
    """
    own: list[Finding] = []
    loop.processes.wait()  # the last checkpoint is on the disk
    if loop.processes.is_main:
        own = _save(manifest, identity, loop, metrics)
    else:
        refuse_stopped(manifest.run, loop)
        help_to_save(loop)
    loop.processes.wait()
    return own


def _save(manifest: Manifest, identity: RunIdentity, loop: TrainingLoop, metrics: MetricsLog) -> list[Finding]:
    """Write the adapter of a finished run, and return the findings about it.

    Raises TrainingStopped if a signal ended the run early.
    """
    run = manifest.run
    manifest.require_whole()
    refuse_stopped(run, loop)
    findings = save_result(run, identity, loop)
    if not metrics.flush():
        message = f"{run.metrics} cannot be written and lacks its last lines; the adapter is complete"
        loop.events.record("metrics_not_written", loop.state.global_step, message)
    manifest.require_whole(*(run.adapter / name for name in RunIdentity.read(run.identity).adapter))
    return findings


def _known(target: RunTarget, config: RunConfig, template: Template, data: Prepared) -> RunIdentity:
    """Return the identity of the run to resume.

    The files that other commands read are rewritten. Raises RunFinished if the run is at its end.
    """
    identity = known_identity(target, config, fingerprint_of(config, template, data))
    target.run.follow_files(config)
    identity = follow_base(target.run, identity, config.base)
    identity = write_relied_on(target.run, identity, config, template, data)
    refuse_at_end(target.run, identity)
    return identity


def _result(
    manifest: Manifest, built: BuiltModel, loop: TrainingLoop, train_s: float, own: list[Finding]
) -> TrainedRun:
    """Return the result of the finished run."""
    data, loss = manifest.planned.prepared, _last(loop, "loss")
    return TrainedRun(
        run=manifest.run,
        resolved=manifest.resolved,
        model=built.model,
        template=manifest.template,
        train_rows=data.train,
        held_out_rows=data.holdout,
        findings=manifest.findings_with([*filter(None, [loop.memory_retry.finding()]), *own]),
        counts=built.counts,
        steps=loop.state.global_step,
        tokens=loop.progress.tokens,
        train_s=train_s,
        loss=math.nan if loss is None else loss,
        eval_loss=_last(loop, "eval_loss"),
        best=best_step(manifest.run.checkpoints),
    )


def _last(loop: TrainingLoop, key: str) -> float | None:
    return next((entry[key] for entry in reversed(loop.state.log_history) if key in entry), None)


def _in_background(work: Callable[[], RunIdentity]) -> Future[RunIdentity]:
    """Run `work` on a daemon thread, so that a killed run waits for no hash."""
    future: Future[RunIdentity] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # noqa: BLE001 (raised by `result()`)
            future.set_exception(error)

    threading.Thread(target=run, name="identity", daemon=True).start()
    return future


@contextlib.contextmanager
def _old_run_aside(run: RunDir, restart: bool) -> Iterator[None]:
    """Move the old run aside for a `restart`.

    The old run is restored if the new one never starts.
    """
    aside = set_run_aside(run) if restart else None
    try:
        yield
    except BaseException:
        restore_run(aside, run)
        raise


@contextlib.contextmanager
def _opened(target: RunTarget, config: RunConfig) -> Iterator[RunLock]:
    """Lock the folder of `target` within the block. A run that never started leaves no new folder."""
    run, is_new, is_own = target.run, not target.run.path.exists(), False
    run.require_writable()
    try:
        with RunLock(run.path) as lock, redirect_library_logs(run.log), deterministic(config.deterministic):
            if run.holds_run != target.resumes:
                raise RunDirError("another process has just used this folder", where=str(run.path), fix="run it again")
            try:
                yield lock
            finally:
                is_own = lock.is_held
    except BaseException:
        if is_new:
            _leave_nothing(run, is_own)
        raise


def _leave_nothing(run: RunDir, is_own: bool) -> None:
    """Remove the folder of a run that never started, unless it lists rejected rows."""
    has_begun = run.settings.exists() or run.has_checkpoint
    if is_own and not has_begun and not (run.path / "rejected.jsonl").exists():
        shutil.rmtree(run.path, ignore_errors=True)
    with contextlib.suppress(OSError):
        run.path.rmdir()  # fails if the folder is not empty


def _require_supported(resolved: Resolved) -> None:
    """Raise UsageError for unsupported settings, before any file is written."""
    if resolved.config.gpus not in (None, 1) and "WORLD_SIZE" not in os.environ:
        fix = "use 'lorafit train --gpus', or torchrun"
        raise UsageError("this process is alone, and cannot use several GPUs", where="gpus", fix=fix)
    if resolved.config.gpu:
        raise UsageError(
            "train uses this machine's own GPU", where="gpu", fix="use gpu with plan, gpu_memory with train"
        )
    require_trackers(resolved.config.report_to)
