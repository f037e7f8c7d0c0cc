"""LorafitTrainer: transformers' Trainer, whose training step is a set of examples packed into micro-batches."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, SequentialSampler

from lorafit.config import RunConfig
from lorafit.data import Rows
from lorafit.engine import Graphs, MicroBatch, Step, VocabularyLoss, packed
from lorafit.errors import CheckpointError, LorafitError
from lorafit.methods.lora import restore_adapter
from lorafit.training.arguments import training_arguments
from lorafit.training.checkpoint import Checkpoint
from lorafit.training.checkpoint_snapshot import (
    ADAPTER,
    TRAINER_STATE,
    Snapshot,
    read_rest,
    restore_randomness,
    restore_training,
)
from lorafit.training.checkpoint_writer import CheckpointWriter
from lorafit.training.clock import TrainingClock
from lorafit.training.events import EventLog
from lorafit.training.layout import Layout
from lorafit.training.memory_retry import MemoryRetry
from lorafit.training.numbers import NumbersJudge
from lorafit.training.prefetch import Prefetched
from lorafit.training.roll_back import RollBack, newest_good
from lorafit.training.save_timer import SaveTimer
from lorafit.training.step_log import StepLog, StepNumbers
from lorafit.training.steps import StepDataset
from lorafit.training.stop_signals import EvaluationStopped, ObeySignals, StopSignals
from lorafit.training.trainer_library import PrinterCallback, Trainer, TrainerCallback, TrainerState, set_seed
from lorafit.training.update_gate import withhold_unless_finite

FP16_ALLOWANCE = 16  # the loss scale starts at 2**16 and halves with every step that overflows


class _EpochSampler(SequentialSampler):
    """Walks the steps in order and passes the epoch on to the dataset, which shuffles."""

    def set_epoch(self, epoch: int) -> None:
        self.data_source.set_epoch(epoch)  # type: ignore[attr-defined]


class _StepLoader(DataLoader[Step]):
    def set_epoch(self, epoch: int) -> None:
        self.dataset.set_epoch(epoch)  # type: ignore[attr-defined]


class LorafitTrainer(Trainer):
    """A Trainer over `Rows`: callbacks, trackers and accelerate's back ends work as they always do.

    One batch of its data loader is one whole `Step`; `training_step` runs the step's micro-batches, each loss
    divided by the supervised tokens of the whole step over all processes. Within a step the host never waits for
    the card: loss and gradient norm are logged one step late, each under its own step number.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        config: RunConfig,
        train_rows: Rows,
        held_out_rows: Rows | None,
        folder: Path,
        *,
        callbacks: list[TrainerCallback] | None = None,
        events: EventLog | None = None,
        micro_tokens: int | None = None,
        vocabulary_loss: VocabularyLoss | None = None,
        run: str = "",
    ) -> None:
        self.config, self.train_rows, self.held_out_rows = config, train_rows, held_out_rows
        self.layout = Layout(micro_tokens or config.max_length)
        probe = StepDataset(train_rows, config, self.layout)
        evaluates = held_out_rows is not None and len(held_out_rows) > 0
        arguments = training_arguments(config, folder, len(probe), _compute_dtype(model), evaluates=evaluates)
        super().__init__(
            model=model,
            args=arguments,
            train_dataset=probe,
            eval_dataset=probe if evaluates else None,
            callbacks=callbacks,
        )
        self.remove_callback(PrinterCallback)  # printing is the command line's
        self.add_callback(ObeySignals(self))
        self.vocabulary_loss = vocabulary_loss or VocabularyLoss.expected(model)
        self.checkpoints = CheckpointWriter(folder, config, run, self._checkpoint_failed)
        self._guard(events or EventLog())
        self.signals, self.save_timer = StopSignals(), SaveTimer(config.save_minutes)
        self.owes_evaluation = False  # a signal cut it short: a resumed run makes up for it first
        self._begins_at = 0
        self._ahead: tuple[Any, Prefetched] | None = None

    def _guard(self, events: EventLog) -> None:
        """What is measured of a step, and what is done when its numbers or the memory go bad."""
        self.model.train()  # every module: PEFT's wrapper says that it trains while the base below it does not
        self._trained = [weight for weight in self.model.parameters() if weight.requires_grad]
        self._measured = torch.zeros(2)
        self.graphs: Graphs | None = None
        self.events, self.clock, self.step_log = events, TrainingClock(), StepLog()
        self.memory = MemoryRetry(self._steps(), events, self.args.device)
        where, allowance = str(events.path or self.args.output_dir), FP16_ALLOWANCE if self.args.fp16 else 0
        self.judge = NumbersJudge(self.config, self.train_rows, events, where, allowance)
        self.reported: StepNumbers | None = None  # the step whose numbers callbacks are seeing
        self.left_out: set[int] = set()  # steps whose data are skipped after a rollback

    def train(self, resume_from_checkpoint: str | bool | None = None, *given: Any, **options: Any) -> Any:
        """Trainer.train on packed attention; the model's own attention is back when it ends.

        `True` goes on from the newest checkpoint that verifies. Raises CheckpointError for one that does not.
        """
        begin = self._newest_good() if resume_from_checkpoint is True else resume_from_checkpoint
        if begin is None:
            set_seed(self.args.seed)  # whatever ran before (a rehearsal, a self-test) may have drawn
        self.model.train()
        self._begins_at = 0
        self.left_out.clear()
        self.judge.start([])
        with packed(self.model), self._no_step_unreported():
            while True:
                try:
                    return super().train(begin, *given, **options)
                except RollBack as back:
                    self.step_log.drop()  # a step that was begun before the spike was known
                    begin = str(back.folder)
                except EvaluationStopped:
                    return None  # before the first step: the checkpoint it began from is still all there is

    def get_train_dataloader(self) -> DataLoader[Step]:
        """One item per optimizer step; already this process's share, so accelerate must not shard it again."""
        steps = self._steps()
        # transformers skips to the resumed step with a loader that knows no epochs
        steps.set_epoch(self._begins_at // len(steps))
        return _StepLoader(steps, batch_size=1, sampler=_EpochSampler(steps), collate_fn=_only)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Step], None]:
        """The next step, made in the background while the one before it ran."""
        if self._ahead is None or self._ahead[0] is not epoch_iterator:
            self._close_ahead()
            self._ahead = epoch_iterator, Prefetched(epoch_iterator, self.args.device)
        assert num_batches == 1, "one batch of the loader is one whole step"
        step = next(self._ahead[1], None)
        return [] if step is None else [step], None

    def floating_point_ops(self, inputs: Any) -> int:
        """Zero: transformers' count takes padded tensors; `bench/` counts operations properly."""
        return 0

    def training_step(self, model: Any, inputs: Step, num_items_in_batch: Any = None) -> torch.Tensor:
        """Forward and backward of every micro-batch; returns the step's mean loss per supervised token."""
        if not model.training:
            model.train()  # it walks through thousands of modules, and compiled layers check them all again
        self.clock.start()
        self.last_step = inputs
        if self.state.global_step + 1 in self.left_out:
            self._loss = self._withheld()
            return self._loss
        share = max(self.args.world_size, 1) / inputs.supervised

        def through(batch: MicroBatch, share: torch.Tensor | float) -> torch.Tensor:
            with self.compute_loss_context_manager():
                loss = self.compute_loss(model, batch, share=share)
            self.accelerator.backward(loss)
            return loss.detach()

        def forward(batch: MicroBatch, last: bool) -> torch.Tensor:
            if self.graphs is not None:
                return self.graphs.run(batch, share, through)
            with contextlib.nullcontext() if last else self.accelerator.no_sync(model=model):
                return through(batch, share)

        self._loss = self.memory.run(self.state.global_step + 1, inputs, forward, model.zero_grad)
        return self._loss

    def _withheld(self) -> torch.Tensor:
        """A step that is left out: no forward, and a gradient that no optimizer applies."""
        self._trained[0].grad = torch.full_like(self._trained[0], float("nan"))
        return torch.full((), float("nan"), device=self.args.device)

    def compute_loss(
        self,
        model: Any,
        inputs: MicroBatch,
        return_outputs: bool = False,
        share: float | torch.Tensor = 1.0,
        **unused: Any,
    ) -> Any:
        """The summed loss of one micro-batch times `share`: one over the step's supervised tokens."""
        assert not return_outputs, "packed micro-batches have no per-row outputs"
        return self.vocabulary_loss.summed(model, inputs.to(self.args.device, non_blocking=True), share)

    def _clip_grad_norm(self, model: Any) -> Any:
        """transformers', without a walk over the frozen weights at every step."""
        return self.accelerator.clip_grad_norm_(self._trained, self.args.max_grad_norm)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """transformers calls this just before `optimizer.step()`: the last moment to withhold the update."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        loss = self.accelerator.reduce(self._loss, "mean") if self.args.world_size > 1 else self._loss
        self._measured = torch.stack([loss.float(), norm.float()])
        withhold_unless_finite(self.optimizer, self._measured)
        return norm

    def _maybe_log_save_evaluate(self, tr_loss: torch.Tensor, *given: Any, **options: Any) -> None:
        """transformers' reads the loss at once; here it is queued, and the step before is logged."""
        state, control = self.state, self.control  # type: ignore[has-type]
        if state.global_step > self._globalstep_last_logged:  # type: ignore[has-type]
            self._globalstep_last_logged = state.global_step
            tr_loss.zero_()
            self.step_log.push(self._unmeasured(options.get("learning_rate")), self._measured)
            self._report(self.step_log.ready())
        if control.should_evaluate or control.should_save or control.should_training_stop:
            self._report(self.step_log.flush())
        control.should_log = False
        with self.clock.stopped():
            super()._maybe_log_save_evaluate(tr_loss, *given, **options)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Mean loss per supervised token over the held-out rows, packed as in training."""
        rows = eval_dataset if isinstance(eval_dataset, Rows) else self.held_out_rows
        loss = self.held_out_loss(rows) if rows is not None else float("nan")
        metrics = {f"{metric_key_prefix}_loss": loss}
        if not math.isfinite(loss):
            step = self.state.global_step
            self.events.record("non_finite_evaluation", step, f"the held-out loss at step {step} is not finite")
        self.log(metrics)
        control: Any = self.control  # type: ignore[has-type]
        self.control = self.callback_handler.on_evaluate(self.args, self.state, control, metrics)
        return metrics

    def held_out_loss(self, rows: Rows) -> float:
        """Mean loss per supervised token of `rows`; the same on every process."""
        model = self.model
        was_training = model.training
        model.eval()
        with torch.no_grad(), packed(model), self.compute_loss_context_manager():
            total = self.memory.evaluate(self.state.global_step, rows, lambda batch: self._held_out(model, batch))
        model.train(was_training)
        return float(total) / max(int(rows.supervised.sum()), 1)

    def _held_out(self, model: Any, batch: MicroBatch) -> torch.Tensor:
        if self.signals.stop is not None and self.is_in_train:
            raise EvaluationStopped
        return self.compute_loss(model, batch)

    def _evaluate(self, *given: Any, **options: Any) -> dict[str, float]:
        """An evaluation within training; one that a signal interrupts is owed, and the checkpoint says so."""
        self.owes_evaluation = True
        try:
            metrics = super()._evaluate(*given, **options)
        except EvaluationStopped:
            if self.state.global_step == self._begins_at:
                raise
            self.control.should_save = self.control.should_training_stop = True
            return {}
        self.owes_evaluation = False
        if self.signals.stop is not None:  # came with the last micro-batch: no further step
            self.control.should_save = self.control.should_training_stop = True
        return metrics

    def _save_checkpoint(self, model: Any, trial: Any = None) -> None:
        if self.args.should_save:
            self.memory.save(self.state.global_step, lambda: self.checkpoints.save(Snapshot.of(self)))

    def _checkpoint_failed(self, step: int, reason: str) -> None:
        """A run does not end for a full disk: the last good checkpoint stays, and the next interval tries again."""
        last = self.checkpoints.newest()
        kept = f"{last.name} is kept" if last else "there is none yet"
        message = f"the checkpoint of step {step} could not be written ({reason}): {kept}, the next save tries again"
        self.events.record("checkpoint_failed", step, message)

    def resumable(self) -> dict[str, Any]:
        """What, besides weights, optimizer, schedule and random states, a resumed run must know; JSON values."""
        return {
            "left_out": sorted(self.left_out),
            "micro_tokens": self.layout.micro_tokens,
            "owes_evaluation": self.owes_evaluation,
        }

    def resume_with(self, known: dict[str, Any]) -> None:
        """Take up what `resumable` gave when the checkpoint was written."""
        self.left_out |= set(known["left_out"])
        self.args.eval_on_start = self.owes_evaluation = known["owes_evaluation"]
        self.layout.micro_tokens = min(self.layout.micro_tokens, known["micro_tokens"])
        steps = [entry for entry in self.state.log_history if "loss" in entry and entry["step"] not in self.left_out]
        self.judge.start((entry["loss"], entry["grad_norm"]) for entry in steps)

    def _newest_good(self) -> str:
        folder = newest_good(self.checkpoints.folder, self.checkpoints.run)
        if folder is None:
            raise CheckpointError("no checkpoint there verifies", where=str(self.checkpoints.folder))
        return str(folder)

    def restore_end(self, folder: Path) -> None:
        """Take up a run whose last step is in the checkpoint `folder`: only the adapter is not written yet."""
        self._load_from_checkpoint(str(folder))
        self.state = TrainerState.load_from_json(str(folder / TRAINER_STATE))
        self.owes_evaluation = read_rest(folder)["run"]["owes_evaluation"]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        checkpoint = Checkpoint.open(Path(resume_from_checkpoint), run=self.checkpoints.run)
        restore_adapter(self.model, checkpoint.folder / ADAPTER)
        self._begins_at = checkpoint.step

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            restore_training(self, Path(checkpoint))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            restore_randomness(Path(checkpoint))

    def _load_scaler(self, checkpoint: str | None) -> None:
        return None  # restored with the optimizer

    def _steps(self) -> StepDataset:
        world = max(self.args.world_size, 1)
        return StepDataset(self.train_rows, self.config, self.layout, rank=self.args.process_index, world=world)

    def _unmeasured(self, learning_rate: float | None) -> StepNumbers:
        rate = self._get_learning_rate() if learning_rate is None else learning_rate
        state = self.state
        return StepNumbers(state.global_step, state.epoch or 0.0, rate, self.last_step.tokens, self.last_step.rows)

    def _report(self, steps: list[StepNumbers]) -> None:
        """Log steps whose numbers have arrived, each as if its step had just ended, and judge them."""
        for numbers in steps:
            self._log_step(numbers)
            if numbers.step in self.left_out:
                continue
            if self.judge.judge(numbers) and self.config.on_spike == "rollback":
                self._roll_back(numbers)

    def _roll_back(self, numbers: StepNumbers) -> None:
        self.checkpoints.wait()
        folder = newest_good(self.checkpoints.folder, self.checkpoints.run)
        if folder is None:
            message = f"step {numbers.step} spiked before there was a checkpoint to go back to; the run goes on"
            self.events.record("rollback_impossible", numbers.step, message)
            return
        self.left_out.add(numbers.step)
        message = f"back to {folder.name}; the rows of step {numbers.step} are left out"
        rows = self.judge.sources(numbers.rows)
        self.events.record("rollback", numbers.step, message, checkpoint=folder.name, rows=rows)
        raise RollBack(folder)

    def _log_step(self, numbers: StepNumbers) -> None:
        self.reported = numbers
        if numbers.is_finite:
            self._total_loss_scalar += numbers.loss
        with self._as_of(numbers):
            self.log({"loss": numbers.loss, "grad_norm": numbers.grad_norm, "learning_rate": numbers.learning_rate})

    @contextlib.contextmanager
    def _as_of(self, numbers: StepNumbers) -> Iterator[None]:
        """Within it the Trainer's state says what it said when that step ended; callbacks and trackers go by it."""
        state = self.state
        now = state.global_step, state.epoch
        state.global_step, state.epoch = numbers.step, numbers.epoch
        try:
            yield
        finally:
            state.global_step, state.epoch = now

    @contextlib.contextmanager
    def _no_step_unreported(self) -> Iterator[None]:
        """A run that has to stop still logs the steps it finished."""
        self.step_log.drop()
        try:
            yield
        except LorafitError:
            for numbers in self.step_log.flush():
                self._log_step(numbers)
            raise
        finally:
            self.clock.stop()
            self._close_ahead()
            if not isinstance(sys.exception(), KeyboardInterrupt):  # a second Ctrl-C waits for nothing
                self.checkpoints.wait()

    def _close_ahead(self) -> None:
        if self._ahead is not None:
            self._ahead[1].close()
            self._ahead = None


def _only(items: list[Step]) -> Step:
    return items[0]


def _compute_dtype(model: torch.nn.Module) -> torch.dtype:
    return next(
        (weight.dtype for weight in model.parameters() if weight.dtype in (torch.bfloat16, torch.float16)),
        torch.float32,
    )
