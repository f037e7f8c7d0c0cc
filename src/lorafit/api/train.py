"""train: data and a base in, a run directory with a proved-loadable adapter out."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback
from transformers.integrations import get_available_reporting_integrations

from lorafit.adapters import Counts, attach, count_parameters
from lorafit.api.describe_run import describe, describe_missing, fingerprint_of, new_identity, new_run_id
from lorafit.api.existing_run import (
    OtherRows,
    Place,
    begin_anew,
    find_place,
    next_free,
    put_back,
)
from lorafit.api.going_on import go_on_from, known_identity, refuse_stopped, save_result
from lorafit.api.observer import Observer
from lorafit.api.plan import PlannedRun, plan_prepared
from lorafit.api.preflight import before_loading, before_reading, require_ready
from lorafit.api.rehearsed_layers import enforce_budget, rehearsed_layers
from lorafit.api.settings import require_base, require_data, settle, template_for
from lorafit.backbone import load_backbone, quiet_libraries
from lorafit.config import Resolved, RunConfig, RunDir, RunIdentity, RunLock, parse_bytes
from lorafit.data import Rows, Template, prepare, require_clean
from lorafit.engine import VocabularyLoss, assert_isolated, packed, vocabulary_loss_for, warm_compiler
from lorafit.errors import RunDirError, TrainingError, UsageError
from lorafit.findings import Finding
from lorafit.planning import hardware_here
from lorafit.training import (
    Checkpoint,
    EarlySignals,
    EventLog,
    LorafitTrainer,
    MetricsLog,
    StopSignals,
    TrainingProgress,
    deterministic,
)

PROOF_ROWS, PROOF_TOKENS = 4, 256


@dataclass(frozen=True)
class TrainedRun:
    """A finished run: its directory, the live model, and what it took."""

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

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready mapping."""
        return {
            "run": str(self.run.path),
            "steps": self.steps,
            "train_rows": len(self.train_rows),
            "held_out_rows": len(self.held_out_rows),
            "loss": self.loss,
            "eval_loss": self.eval_loss,
            "train_s": round(self.train_s, 2),
            "tokens_per_s": round(self.tokens / max(self.train_s, 1e-9)),
            "trainable_parameters": self.counts.trainable,
            "total_parameters": self.counts.total,
            "findings": [finding.to_dict() for finding in self.findings],
        }


def train(
    data: Sequence[str | Path] | str | Path | None = None,
    /,
    base: str | None = None,
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
    with EarlySignals():
        place = find_place(resolved, restart=restart)
        aside = begin_anew(place.run) if restart else None
        try:
            return _train_at(place, resolved, watch, list(callbacks))
        except OtherRows:
            fresh = Place(next_free(resolved), goes_on=False, is_named=False)
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
        RunLock(run.path),
        quiet_libraries(run.log),
        deterministic(resolved.config.deterministic),
    ):
        try:
            if run.holds_run != place.goes_on:
                raise RunDirError("another process has just used this folder", where=str(run.path), fix="run it again")
            resolved = place.settled(resolved)
            template = template_for(resolved)
            # a run that goes on has its split and its rejected rows already
            own = None if place.goes_on else run.path
            prepared = prepare(resolved.config, template, run_dir=own, on_progress=watch.reading)
            watch.checked(prepared)
            require_clean(prepared)
            known = (
                known_identity(place, fingerprint_of(resolved.config, template, prepared)) if place.goes_on else None
            )
            planned = plan_prepared(resolved, prepared, hardware_here(resolved.config))
            watch.planned(planned.plan, planned.resolved)
            late = before_loading(planned, run, torch.cuda.is_available)
            watch.ready(late)
            require_ready([*planned.plan.findings, *late])
            findings = [*early, *prepared.findings, *planned.plan.findings, *late]
            return _fit(run, known, planned, template, findings, watch, callbacks)
        except BaseException:
            _leave_nothing(run, is_new)
            raise


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


def _leave_nothing(run: RunDir, is_new: bool) -> None:
    """Remove the folder of a run that never started, unless it explains which rows were rejected."""
    if is_new and not run.settings.exists() and not (run.path / "rejected.jsonl").exists():
        shutil.rmtree(run.path, ignore_errors=True)


def _fit(
    run: RunDir,
    known: RunIdentity | None,
    planned: PlannedRun,
    template: Template,
    findings: list[Finding],
    watch: Observer,
    callbacks: list[TrainerCallback],
) -> TrainedRun:
    resolved, prepared = planned.resolved, planned.prepared
    config = resolved.config
    watch.loading(run)
    run_id = known.run if known else new_run_id()
    with ThreadPoolExecutor(1, "identity") as aside:
        # the base is hashed while it is loaded, and while its layers are compiled
        identity = aside.submit(lambda: known or new_identity(planned, template, run_id))
        model, loss = _proved_model(planned)
        counts = count_parameters(model)
        watch.attached(counts, config.base)
        events = EventLog(run.events, watch.happened, is_new=known is None)
        if loss.reason:
            events.record("whole_logits", 0, loss.reason)
        trainer = LorafitTrainer(
            model,
            config,
            prepared.train,
            prepared.holdout,
            run.checkpoints,
            callbacks=callbacks,
            events=events,
            vocabulary_loss=loss,
            run=run_id,
        )
        progress, metrics = TrainingProgress(watch.stepped, trainer), MetricsLog(run.metrics)
        trainer.add_callback(progress)
        trainer.add_callback(metrics)
        with rehearsed_layers(trainer, resolved, run) as rehearsal, StopSignals(watch.stopping) as trainer.signals:
            watch.rehearsed(rehearsal)
            if known is None:
                describe(run, identity.result(), planned, template, findings)
            else:
                _describe_again(run, known, planned, template, findings, events)
            started = time.perf_counter()
            _run(trainer, go_on_from(run, config, known, events) if known else None, metrics)
            train_s = time.perf_counter() - started
            refuse_stopped(run, trainer)
            save_result(run, identity.result(), trainer)
            if not metrics.flush():
                message = f"{run.metrics} cannot be written, and lacks the last lines; the adapter is whole"
                events.record("metrics_not_written", trainer.state.global_step, message)
    history = trainer.state.log_history
    return TrainedRun(
        run=run,
        resolved=resolved,
        model=model,
        template=template,
        train_rows=prepared.train,
        held_out_rows=prepared.holdout,
        findings=_with_the_runs_own(run, findings, trainer.memory.finding()),
        counts=counts,
        steps=trainer.state.global_step,
        tokens=progress.tokens,
        train_s=train_s,
        loss=next((entry["loss"] for entry in reversed(history) if "loss" in entry), math.nan),
        eval_loss=next((entry["eval_loss"] for entry in reversed(history) if "eval_loss" in entry), None),
    )


def _describe_again(
    run: RunDir,
    known: RunIdentity,
    planned: PlannedRun,
    template: Template,
    findings: list[Finding],
    events: EventLog,
) -> None:
    """Write what is gone of the run's description, and say so."""
    names = describe_missing(run, known, planned, template, findings)
    if names:
        events.record("described_again", 0, f"{', '.join(names)} had gone from {run.path} and is written again")


def _with_the_runs_own(run: RunDir, findings: list[Finding], own: Finding | None) -> list[Finding]:
    """`findings` and what the run itself found, written down where there is such a thing."""
    if own is None:
        return findings
    run.write_json(run.findings, [finding.to_dict() for finding in [*findings, own]])
    return [*findings, own]


def _dense_budget(config: RunConfig) -> int | None:
    """Bytes for dequantised copies on a CPU: half of a budget that was set, else half of what is free."""
    return parse_bytes(config.vram, "vram") // 2 if config.vram else None


def _run(trainer: LorafitTrainer, checkpoint: Checkpoint | None, metrics: MetricsLog) -> None:
    try:
        if checkpoint is not None and checkpoint.step >= trainer.args.max_steps:
            trainer.restore_end(checkpoint.folder)
            metrics.begin(trainer.state.log_history)
            if trainer.owes_evaluation:
                trainer.evaluate()
        else:
            trainer.train(resume_from_checkpoint=str(checkpoint.folder) if checkpoint else None)
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            f"the card's memory ran out in step {trainer.state.global_step + 1}",
            where=str(trainer.args.output_dir),
            fix=f"lower max_tokens (now {trainer.config.max_tokens}) or set gradient_checkpointing=on",
        ) from error


def _proved_model(planned: PlannedRun) -> tuple[Any, VocabularyLoss]:
    """The adapted base on packed attention, rows proved isolated, and the loss that is proved to be its own."""
    config = planned.resolved.config
    enforce_budget(config)
    if torch.cuda.is_available() and config.compile != "off":
        warm_compiler()
    model: Any = attach(load_backbone(config, dense_budget_bytes=_dense_budget(config)), config, planned.plan.targets)
    samples = _samples(planned.prepared.train)
    with packed(model):
        assert_isolated(model, samples)
        return model, vocabulary_loss_for(model, samples)


def _samples(rows: Rows) -> list[tuple[Any, Any]]:
    """The beginnings of the shortest rows, every token in the loss: what proofs run on, whatever the longest row."""
    chosen = rows.lengths.argsort(kind="stable")[:PROOF_ROWS]
    beginnings = [rows.ids(int(row))[:PROOF_TOKENS] for row in chosen]
    return [(ids, np.arange(len(ids)) > 0) for ids in beginnings]
