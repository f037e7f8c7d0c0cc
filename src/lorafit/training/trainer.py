"""LorafitTrainer: transformers' Trainer, whose training step is a set of examples packed into micro-batches."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, SequentialSampler
from transformers import PrinterCallback, Trainer, TrainerCallback

from lorafit.config import RunConfig
from lorafit.data import Rows, pack_step
from lorafit.engine import MicroBatch, Step, packed, summed_loss
from lorafit.training.arguments import training_arguments
from lorafit.training.checkpoint import write_checkpoint
from lorafit.training.steps import StepDataset, pack_rows


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
    divided by the supervised tokens of the whole step over all processes.
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
    ) -> None:
        self.config, self.train_rows, self.held_out_rows = config, train_rows, held_out_rows
        probe = StepDataset(train_rows, config)
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

    def train(self, *given: Any, **options: Any) -> Any:
        """Trainer.train on packed attention; the model's own attention is back when it ends."""
        with packed(self.model):
            return super().train(*given, **options)

    def get_train_dataloader(self) -> DataLoader[Step]:
        """One item per optimizer step; already this process's share, so accelerate must not shard it again."""
        steps = StepDataset(
            self.train_rows, self.config, rank=self.args.process_index, world=max(self.args.world_size, 1)
        )
        return _StepLoader(steps, batch_size=1, sampler=_EpochSampler(steps), collate_fn=_only)

    def _get_num_items_in_batch(self, batch_samples: list[Step], device: torch.device) -> None:
        return None  # a Step knows its own supervised tokens

    def floating_point_ops(self, inputs: Any) -> int:
        """Zero: transformers' count takes padded tensors; `bench/` counts operations properly."""
        return 0

    def training_step(self, model: Any, inputs: Step, num_items_in_batch: Any = None) -> torch.Tensor:
        """Forward and backward of every micro-batch; returns the step's mean loss per supervised token."""
        model.train()
        self.last_step = inputs
        total = torch.zeros((), device=self.args.device)
        for place, batch in enumerate(inputs.micro_batches):
            last = place == len(inputs.micro_batches) - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(model=model):
                with self.compute_loss_context_manager():
                    loss = self.compute_loss(model, batch) * (max(self.args.world_size, 1) / inputs.supervised)
                self.accelerator.backward(loss)
            total += loss.detach()
        return total

    def compute_loss(self, model: Any, inputs: MicroBatch, return_outputs: bool = False, **unused: Any) -> Any:
        """The summed loss of one micro-batch; the caller divides by the step's supervised tokens."""
        assert not return_outputs, "packed micro-batches have no per-row outputs"
        return summed_loss(model, inputs.to(self.args.device, non_blocking=True))

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Mean loss per supervised token over the held-out rows, packed as in training."""
        rows = eval_dataset if isinstance(eval_dataset, Rows) else self.held_out_rows
        metrics = {f"{metric_key_prefix}_loss": self.held_out_loss(rows) if rows is not None else float("nan")}
        self.log(metrics)
        control: Any = self.control  # type: ignore[has-type]
        self.control = self.callback_handler.on_evaluate(self.args, self.state, control, metrics)
        return metrics

    def held_out_loss(self, rows: Rows) -> float:
        """Mean loss per supervised token of `rows`; the same on every process."""
        model = self.model
        was_training = model.training
        model.eval()
        total = torch.zeros((), device=self.args.device)
        with torch.no_grad(), packed(model), self.compute_loss_context_manager():
            for members in pack_step(rows.lengths, self.config.max_tokens):
                total += self.compute_loss(model, pack_rows(rows, members))
        model.train(was_training)
        return float(total) / max(int(rows.supervised.sum()), 1)

    def _save_checkpoint(self, model: Any, trial: Any = None) -> None:
        if self.args.should_save:
            write_checkpoint(self, Path(self.args.output_dir), self.config)


def _only(items: list[Step]) -> Step:
    return items[0]


def _compute_dtype(model: torch.nn.Module) -> torch.dtype:
    return next(
        (weight.dtype for weight in model.parameters() if weight.dtype in (torch.bfloat16, torch.float16)),
        torch.float32,
    )
