"""TrainingLoop: train a run from its first step, or a checkpoint, to its last step."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorafit.config import RunConfig
from lorafit.data import Rows, steps_per_epoch
from lorafit.engine import Step
from lorafit.errors import ProcessLost, TrainingError
from lorafit.methods import Method
from lorafit.methods.full.sharding import gathers_layers, is_sharded
from lorafit.objectives import Objective
from lorafit.runs import ADAPTER, Checkpoint, newest_whole
from lorafit.training.batches import Layout, Prefetched, StepDataset
from lorafit.training.checkpoints.sharded import ShardedWriter
from lorafit.training.checkpoints.snapshot import generators_state, restore_randomness
from lorafit.training.checkpoints.writer import CheckpointWriter, SaveTimer
from lorafit.training.distributed import Processes
from lorafit.training.guards.loss_monitor import MIN_SEEN, LossMonitor
from lorafit.training.guards.memory_retry import AllocatorWatch, MemoryRetry, TunedMemory, too_little_memory
from lorafit.training.logging.progress import StepLog, StepNumbers, TrainingClock, TrainingProgress
from lorafit.training.run_context import RunContext
from lorafit.training.schedule import OneByOne, autocast_dtype, compute_dtype
from lorafit.training.transformers_parts import (
    Callbacks,
    TrainerControl,
    TrainerState,
    build_lr_scheduler,
    build_optimizer,
    set_seed,
    training_arguments,
    withhold_unless_finite,
)
from lorafit.training.updates import begin_of, clip, undo

FP16_ALLOWANCE = 16  # the loss scale starts at 2**16 and halves at each overflow


class TrainingLoop:
    """Train one run. A step is a set of examples; their packing and order is the layout.

    The loss is divided by the supervised tokens of the whole step over all processes. Within a step the host never
    waits for the GPU: loss and gradient norm are logged one step late, each under its own step number. transformers'
    callbacks and trackers see `arguments`, `state` and `control` as in its own Trainer.

    Attributes:
        context: processes, logs, signals and callbacks.
        memory_retry: retries steps when memory runs out.
        loss_monitor: judges losses and gradient norms.
        checkpoints: the writer of checkpoints, on a separate thread.
        left_out: steps whose rows are skipped after a rollback.
        stop: the signal that stops all processes, whichever received it.
        owes_evaluation: True if a signal interrupted an evaluation; a resumed run evaluates first.
    """

    def __init__(
        self,
        model: nn.Module,
        method: Method,
        objective: Objective,
        config: RunConfig,
        train_rows: Rows,
        held_out_rows: Rows | None,
        context: RunContext,
        memory: TunedMemory | None = None,
    ) -> None:
        self.model, self.method, self.config = model, method, config
        self.train_rows, self.held_out_rows, self.trained = train_rows, held_out_rows, method.trainable(model)
        self.context, self.signals, self.events = context, context.signals, context.events
        self.stop: int | None = None
        self.optimizer, self.lr_scheduler = (None, None)  # type: Any, Any
        self.left_out, self.owes_evaluation = set[int](), False
        self._ahead: Prefetched | None = None
        epoch_steps = steps_per_epoch(len(train_rows), config.examples_per_step)
        dtype, evaluates = compute_dtype(model), bool(held_out_rows)
        self.arguments = training_arguments(config, context.checkpoints, epoch_steps, dtype, evaluates=evaluates)
        self.processes = context.processes or Processes()  # the arguments have joined the process group
        is_main = self.processes.is_main
        self.callbacks = Callbacks(self.arguments, model, context.callbacks, epoch_steps=epoch_steps, is_main=is_main)
        memory = memory or TunedMemory(config.max_length)
        self.rows = memory.rows
        self._set_up_steps(objective, memory)
        self._set_up_guards(memory)
        self.clock, self.step_log = TrainingClock(), StepLog()
        self.progress = TrainingProgress(context.show, self.clock)

    def run(self, checkpoint: Path | None = None) -> None:
        """Train from `checkpoint`, or from the first step, to the last step or a signal.

        Raises CheckpointError for a checkpoint that does not verify, TrainingError for a run that must stop.
        """
        self.left_out.clear()
        with self.rows.attending(self.model), self._clean_up():
            self._begin(checkpoint)
            self._began_at, self._first_step = time.perf_counter(), self.state.global_step
            while not self.control.should_training_stop:
                step = self._next_step()

                # ---------------------------------------------------------------- one optimizer step
                if self.state.global_step + 1 in self.left_out:
                    measured = torch.full((2,), math.nan, device=self.device)
                else:
                    loss = self.forward_backward(step)
                    measured = self._clip(loss)
                    self._update(measured)
                numbers = self._advance(step)
                # ----------------------------------------------------------------

                self.context.before_write()
                self.step_log.push(numbers, measured)
                self._collect_requests()
                if last_good := self._log_finished():
                    self._begin(last_good)
                    continue
                with self.clock.stopped():
                    if self.control.should_evaluate:
                        self._evaluate_now()
                    if self.control.should_save:
                        self._save()
            self._end()

    @property
    def state(self) -> TrainerState:
        """Return step, epoch and history of the run, as transformers keeps them."""
        return self.callbacks.state

    @property
    def control(self) -> TrainerControl:
        """Return the requests of callbacks, intervals and signals."""
        return self.callbacks.control

    def forward_backward(self, step: Step) -> Tensor:
        """Run the micro-batches of `step`, and return the mean loss per supervised token. Gradients are added."""
        if not self.model.training:
            self.model.train()  # slow: visits thousands of modules, and compiled layers check their guards again
        number = self.state.global_step + 1
        return self.memory_retry.run(number, step, self.schedule, partial(undo, self.optimizer, self.trained))

    def _clip(self, loss: Tensor) -> Tensor:
        """Sum over processes, clip, and return loss and gradient norm (2,) on the device."""
        loss = self.processes.total(loss)
        self.processes.add_gradients(self.trained)
        self.scaler.unscale_(self.optimizer)
        norm = clip(self.optimizer, self.trained, self.config.max_grad_norm, self.processes)
        return torch.stack([loss.float(), norm.float()])

    def _update(self, measured: Tensor) -> None:
        """Step the optimizer, unless a number in `measured` is not finite."""
        self.callbacks.at("on_pre_optimizer_step")
        withhold_unless_finite(self.optimizer, measured)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.callbacks.at("on_optimizer_step")

    def _advance(self, step: Step) -> StepNumbers:
        """Count `step` as done, advance the learning rate, and return the step's known numbers."""
        rate = float(self.lr_scheduler.get_last_lr()[0])
        self.lr_scheduler.step()
        undo(self.optimizer, self.trained)
        epoch, place = divmod(self.state.global_step, len(self.steps))
        self.state.global_step += 1
        self.state.epoch = epoch + (place + 1) / len(self.steps)
        self.callbacks.at("on_step_end")
        if place + 1 == len(self.steps):
            self.callbacks.at("on_epoch_end")
        if self.allocator_watch is not None:
            self.allocator_watch.end_step(self.state.global_step)
        return StepNumbers(self.state.global_step, self.state.epoch, rate, step.tokens, step.rows)

    def _collect_requests(self) -> None:
        """Add the requests of signals, the clock and rollbacks to those of callbacks."""
        self.checkpoints.poll()
        if self._is_stopped():
            self.callbacks.stop(save=True)
        # a checkpoint before the first possible spike, so that rollback never depends on timing
        before_spikes = self.config.on_spike == "rollback" and self.state.global_step == MIN_SEEN
        if self.processes.any(self.signals.save or before_spikes or self.save_timer.is_due()):
            self.control.should_save = True
        self.signals.save = False

    def _log_finished(self) -> Path | None:
        """Log and judge the steps whose numbers have arrived; return the checkpoint for a rollback."""
        control = self.control
        waits = control.should_evaluate or control.should_save or control.should_training_stop
        for numbers in self.step_log.flush() if waits else self.step_log.ready():
            self._log_step(numbers)
            if numbers.step in self.left_out or not self.loss_monitor.judge(numbers):
                continue
            if self.config.on_spike == "rollback" and (folder := self._last_good(numbers)):
                return folder
        return None

    def _evaluate_now(self) -> None:
        """Evaluate between steps. An interrupted evaluation is owed, and the checkpoint records that."""
        assert self.held_out_rows is not None
        self.owes_evaluation = True
        if (loss := self.held_out_loss(self.held_out_rows, stops=True)) is not None:
            self._report_evaluation(loss)
            self.owes_evaluation = False
            self.control.should_save |= self.config.keep_best > 0 and self.callbacks.is_best(loss)
        if self._is_stopped():
            self.callbacks.stop(save=True)

    def _save(self) -> None:
        """Start to write a checkpoint of the present state, while training continues."""
        self.context.before_save()
        generators = self.processes.gathered(generators_state())
        self.processes.require_same(self.trained)
        if self.processes.is_main or self.checkpoints.is_shared:
            take = self.checkpoints.snapshot
            self.memory_retry.save(self.state.global_step, lambda: self.checkpoints.save(take(self, generators)))
        self.callbacks.at("on_save")
        self.save_timer.start()

    def _next_step(self) -> Step:
        """Return the next step, prepared in the background during the previous one."""
        epoch, place = divmod(self.state.global_step, len(self.steps))
        if place == 0:
            self.callbacks.at("on_epoch_begin")
            torch.empty((), dtype=torch.int64).random_()  # earlier releases drew here; keeps their runs' bits
        if place == 0 or self._ahead is None:
            self._close_ahead()
            self._ahead = Prefetched(self.steps.epoch(epoch, place), self.device)
        step: Step = next(self._ahead)
        self.events.at(self.state.global_step + 1)
        self.callbacks.at("on_step_begin")
        if self.allocator_watch is not None:
            self.allocator_watch.begin_step()
        self.clock.start()
        return step

    def evaluate(self, rows: Rows | None = None, prefix: str = "eval") -> dict[str, float]:
        """Log and return the mean loss per supervised token over `rows`, default the held-out ones."""
        chosen = rows if rows is not None else self.held_out_rows
        loss = self.held_out_loss(chosen) if chosen is not None else None
        return self._report_evaluation(math.nan if loss is None else loss, prefix)

    def held_out_loss(self, rows: Rows, *, stops: bool = False) -> float | None:
        """Return the mean loss per supervised token of `rows`, None if a signal `stops` it."""
        stops = stops and self.processes.world == 1  # several share the rows, and stop together after them
        was_training = self.model.training
        self.model.eval()
        with torch.no_grad(), self.rows.attending(self.model):
            step, loss_of = self.state.global_step, self.schedule.loss
            total = self.memory_retry.evaluate(step, rows, loss_of, lambda: stops and self.signals.stop is not None)
        self.model.train(was_training)
        return None if total is None else float(total) / (self.steps.objective.weight(rows) or 1)

    def _report_evaluation(self, loss: float, prefix: str = "eval") -> dict[str, float]:
        step, metrics = self.state.global_step, {f"{prefix}_loss": loss}
        if not math.isfinite(loss):
            self.events.record("non_finite_evaluation", step, f"the held-out loss at step {step} is not finite")
        self.progress.evaluated(loss)
        self.callbacks.log(metrics, step, self.state.epoch)
        self.callbacks.at("on_evaluate", metrics)
        return metrics

    def _begin(self, checkpoint: Path | None) -> None:
        """Set up the state that steps change. A `checkpoint` restores it, to resume or to roll back."""
        self._close_ahead()
        self.step_log.drop()
        if checkpoint is None:
            set_seed(self.arguments.seed)  # a dry run or a proof may have drawn
            self.processes.part_streams(self.arguments.seed)
        else:
            Checkpoint.open(checkpoint, run=self.checkpoints.run)
            self.method.restore(self.model, checkpoint / ADAPTER)
        self.model.train()
        self.optimizer = build_optimizer(self.trained, self.arguments, self.model, self.method, self.config)
        self.schedule.begin = begin_of(self.optimizer, self.config.max_grad_norm)
        self.lr_scheduler = build_lr_scheduler(self.optimizer, self.arguments)
        self.callbacks.begin(checkpoint, self.optimizer, self.lr_scheduler)
        if checkpoint is not None:
            self._restore_progress(self.checkpoints.restore(self, checkpoint))
        self.loss_monitor.start(self.state.log_history, self.left_out)
        self.callbacks.at("on_train_begin")
        self.save_timer.start()
        if self.owes_evaluation:
            self._evaluate_now()
        if self.owes_evaluation or self.state.global_step >= self.arguments.max_steps:
            self.callbacks.stop()
        if checkpoint is not None and not restore_randomness(checkpoint, self.processes.rank):
            self.processes.part_streams(self.arguments.seed, self.state.global_step)

    def resumable(self) -> dict[str, Any]:
        """Return the further state of a resumed run, besides weights, optimizer, schedule and random states."""
        return {
            "left_out": sorted(self.left_out),
            "micro_tokens": self.steps.layout.micro_tokens,
            "owes_evaluation": self.owes_evaluation,
        }

    def _restore_progress(self, known: dict[str, Any]) -> None:
        """Restore the state that `resumable` returned when the checkpoint was written."""
        self.left_out |= set(known["left_out"])
        self.owes_evaluation = bool(known["owes_evaluation"])
        self.steps.layout.micro_tokens = min(self.steps.layout.micro_tokens, known["micro_tokens"])

    def _last_good(self, spike: StepNumbers) -> Path | None:
        """Skip the rows of `spike`, and return the newest valid checkpoint, None without one."""
        self.checkpoints.wait()
        last = self.processes.from_main(lambda: newest_whole(self.checkpoints.folder, self.checkpoints.run)[0])
        if last is None:
            message = f"step {spike.step} spiked before the first checkpoint; the run continues without a rollback"
            self.events.record("rollback_impossible", spike.step, message)
            return None
        self.left_out.add(spike.step)
        message = f"rolled back to {last.folder.name}; the rows of step {spike.step} are left out"
        rows = self.loss_monitor.sources(spike.rows)
        self.events.record("rollback", spike.step, message, checkpoint=last.folder.name, rows=rows)
        return last.folder

    def _end(self) -> None:
        """Log the run's duration, and tell the callbacks that it is over."""
        seconds, steps = time.perf_counter() - self._began_at, self.state.global_step - self._first_step
        speed = {"train_runtime": round(seconds, 4), "train_steps_per_second": round(steps / max(seconds, 1e-9), 3)}
        self.callbacks.log(speed, self.state.global_step, self.state.epoch)
        self.callbacks.at("on_train_end")

    @contextlib.contextmanager
    def _clean_up(self) -> Iterator[None]:
        """Log finished steps, end the threads, and wait for the last checkpoint."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise too_little_memory(self.state.global_step + 1, self.checkpoints.folder) from error
        except ProcessLost:  # a sum that waits for a lost GPU would hold the flush
            raise
        except TrainingError:
            for numbers in self.step_log.flush():
                self._log_step(numbers)
            raise
        finally:
            self.clock.stop()
            self._close_ahead()
            if not isinstance(sys.exception(), KeyboardInterrupt):  # a second Ctrl-C does not wait
                self.checkpoints.wait()

    def _set_up_steps(self, objective: Objective, memory: TunedMemory) -> None:
        """Set up this process's micro-batches, and the schedule that runs them."""
        self.device: torch.device = self.arguments.device
        rank, world = self.processes.rank, self.processes.world
        layout = Layout(memory.micro_tokens, self.rows.is_padded)
        parts, even = (self.train_rows, self.config, layout), gathers_layers(self.model)
        self.steps = StepDataset(*parts, objective=objective, rank=rank, world=world, even=even)
        autocast = autocast_dtype(self.model, self.device)
        self.schedule = OneByOne(self.model, objective, self.device, autocast=autocast, graphs=memory.graphs)
        self.scaler = self.schedule.scaler

    def _set_up_guards(self, memory: TunedMemory) -> None:
        """Set up the guards of memory, numbers and time."""
        self.model.train()  # every module: PEFT's wrapper is in training mode while its base is not
        folder, events = self.context.checkpoints, self.events
        self.memory_retry = MemoryRetry(self.steps, events, self.device, memory, self.processes)
        self.allocator_watch: AllocatorWatch | None = None
        if memory.watches_allocator and memory.layers is not None:
            self.allocator_watch = AllocatorWatch(memory.layers, events, on_change=memory.changed)
        allowance, where = FP16_ALLOWANCE if self.scaler.is_enabled() else 0, str(events.path or folder)
        self.loss_monitor = LossMonitor(self.config, self.train_rows, events, where, allowance)
        kind = ShardedWriter if is_sharded(self.model) else CheckpointWriter
        self.checkpoints = kind(folder, self.config, self.context.run, events)
        self.save_timer = SaveTimer(self.config.save_minutes)

    def _log_step(self, numbers: StepNumbers) -> None:
        logs = {"loss": numbers.loss, "grad_norm": numbers.grad_norm, "learning_rate": numbers.learning_rate}
        self.callbacks.log(logs, numbers.step, numbers.epoch)
        if self.processes.is_main:
            self.progress.step(numbers, self.state.max_steps)

    def _is_stopped(self) -> bool:
        self.stop = self.processes.most(self.signals.stop or 0) or None
        return self.stop is not None

    def _close_ahead(self) -> None:
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None
