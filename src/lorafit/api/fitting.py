"""Fitting: a ready run's way from its base to its adapter."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import torch

from lorafit.api.going_on import go_on_from, layout_of, refuse_stopped, save_result
from lorafit.api.observer import Observer
from lorafit.api.proved_model import proved_model
from lorafit.api.ready_run import ReadyRun
from lorafit.api.rehearsed_layers import rehearsed_layers
from lorafit.api.standing_folder import StandingFolder
from lorafit.api.trained_run import TrainedRun
from lorafit.engine import VocabularyLoss
from lorafit.errors import TrainingError
from lorafit.methods.lora import count_parameters
from lorafit.runs import RunIdentity
from lorafit.training import Checkpoint, EventLog, LorafitTrainer, MetricsLog, StopSignals, TrainingProgress
from lorafit.training.trainer_library import TrainerCallback


def fit(ready: ReadyRun, watch: Observer, callbacks: list[TrainerCallback]) -> TrainedRun:
    """Load the base, prove it, train, and write the adapter. Raises LorafitError, TrainingStopped after a signal."""
    watch.loading(ready.run)
    # the base is hashed while it is loaded, and while its layers are compiled
    identity = _aside(ready.identity)
    return Fitting(ready, watch, callbacks).run(identity)


def _aside(work: Callable[[], RunIdentity]) -> Future[RunIdentity]:
    """`work` on a thread of its own, a daemon: a run that a signal ends at once waits for no hash."""
    future: Future[RunIdentity] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # noqa: BLE001 (raised where the result is asked for)
            future.set_exception(error)

    threading.Thread(target=run, name="identity", daemon=True).start()
    return future


class Fitting:
    """One run at work: the proved model, its trainer, and what keeps a record of it."""

    def __init__(self, ready: ReadyRun, watch: Observer, callbacks: list[TrainerCallback]) -> None:
        self.ready, self.watch = ready, watch
        self.model, loss = proved_model(ready.planned)
        self.counts = count_parameters(self.model)
        watch.attached(self.counts, ready.resolved.config.base)
        self.events = EventLog(ready.run.events, watch.happened, is_new=ready.known is None)
        if loss.reason:
            self.events.record("whole_logits", 0, loss.reason)
        self.trainer = self._trainer(loss, callbacks)
        self.progress = TrainingProgress(watch.stepped, self.trainer)
        self.metrics = MetricsLog(ready.run.metrics)
        self.trainer.add_callback(self.progress)
        self.trainer.add_callback(self.metrics)

    def run(self, identity: Future[RunIdentity]) -> TrainedRun:
        """Train to the end, from the newest checkpoint that verifies, and write the adapter."""
        with (
            rehearsed_layers(self.trainer, self.ready.resolved, self.ready.run) as rehearsal,
            StopSignals(self.watch.stopping) as self.trainer.signals,
        ):
            self.watch.rehearsed(rehearsal)
            layout = layout_of(self.trainer, rehearsal)
            folder = StandingFolder(self.ready, self._begun(identity.result(), layout), self.trainer)
            checkpoint = self._begin(folder.identity, layout)
            self.trainer.add_callback(folder)
            started = time.perf_counter()
            self._train(checkpoint)
            train_s = time.perf_counter() - started
            folder.mend()
            refuse_stopped(self.ready.run, self.trainer)
            self._save(folder.identity)
            result = self._result(train_s)
            folder.require_whole()
        return result

    def _begun(self, identity: RunIdentity, layout: dict[str, Any]) -> RunIdentity:
        """The identity of a new run with the layout it begins in; that of a run that goes on as it is."""
        return identity if self.ready.known else replace(identity, environment={**identity.environment, **layout})

    def _trainer(self, loss: VocabularyLoss, callbacks: list[TrainerCallback]) -> LorafitTrainer:
        prepared = self.ready.planned.prepared
        return LorafitTrainer(
            self.model,
            self.ready.resolved.config,
            prepared.train,
            prepared.holdout,
            self.ready.run.checkpoints,
            callbacks=callbacks,
            events=self.events,
            vocabulary_loss=loss,
            run=self.ready.run_id,
        )

    def _begin(self, identity: RunIdentity, layout: dict[str, Any]) -> Checkpoint | None:
        """Describe the run in its folder; the checkpoint to go on from, None for the first step."""
        run, known = self.ready.run, self.ready.known
        self.ready.lock.hold()  # loading takes minutes
        gone = self.ready.describe(identity)
        if gone:
            message = f"{', '.join(gone)} had gone from {run.path}, and is written again"
            self.events.record("described_again", 0, message)
        return go_on_from(run, known, layout, self.events) if known else None

    def _train(self, checkpoint: Checkpoint | None) -> None:
        trainer = self.trainer
        try:
            if checkpoint is not None and checkpoint.step >= trainer.args.max_steps:
                self._take_up_end(checkpoint)
            else:
                trainer.train(resume_from_checkpoint=str(checkpoint.folder) if checkpoint else None)
        except torch.OutOfMemoryError as error:
            raise TrainingError(
                f"the card's memory ran out in step {trainer.state.global_step + 1}",
                where=str(trainer.args.output_dir),
                fix="set gpu_memory below what is free there, or begin anew (--restart) with memory_policy=recompute",
            ) from error

    def _take_up_end(self, checkpoint: Checkpoint) -> None:
        """The last step was trained: make up for an evaluation that a signal cut short, if there is one."""
        self.trainer.restore_end(checkpoint.folder)
        self.metrics.begin(self.trainer.state.log_history)
        if self.trainer.owes_evaluation:
            self.trainer.evaluate()

    def _save(self, identity: RunIdentity) -> None:
        run = self.ready.run
        save_result(run, identity, self.trainer)
        if not self.metrics.flush():
            message = f"{run.metrics} cannot be written, and lacks the last lines; the adapter is whole"
            self.events.record("metrics_not_written", self.trainer.state.global_step, message)

    def _result(self, train_s: float) -> TrainedRun:
        ready, trainer, loss = self.ready, self.trainer, self._last("loss")
        return TrainedRun(
            run=ready.run,
            resolved=ready.resolved,
            model=self.model,
            template=ready.template,
            train_rows=ready.planned.prepared.train,
            held_out_rows=ready.planned.prepared.holdout,
            findings=ready.findings_with(trainer.memory.finding()),
            counts=self.counts,
            steps=trainer.state.global_step,
            tokens=self.progress.tokens,
            train_s=train_s,
            loss=math.nan if loss is None else loss,
            eval_loss=self._last("eval_loss"),
        )

    def _last(self, key: str) -> float | None:
        return next((entry[key] for entry in reversed(self.trainer.state.log_history) if key in entry), None)
