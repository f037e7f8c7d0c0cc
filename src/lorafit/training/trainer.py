"""LorafitTrainer: transformers' Trainer over the training loop, for code that expects one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lorafit.data import Rows
from lorafit.errors import CheckpointError
from lorafit.runs import newest_whole
from lorafit.training.loop import TrainingLoop
from lorafit.training.transformers_parts import Trainer


class LorafitTrainer(Trainer):
    """Forward train, evaluate and save_model to `loop`. Callbacks and state are the loop's too."""

    def __init__(self, loop: TrainingLoop) -> None:
        evaluates = loop.held_out_rows is not None and len(loop.held_out_rows) > 0
        super().__init__(
            model=loop.model,
            args=loop.arguments,
            train_dataset=loop.steps,
            eval_dataset=loop.held_out_rows if evaluates else None,
        )
        self.loop = loop
        self.callback_handler = loop.callbacks.handler
        self._mirror_loop()

    def train(self, resume_from_checkpoint: str | bool | None = None, *given: Any, **options: Any) -> Any:
        """Train from the first step or from a checkpoint.

        `True` resumes from the newest valid checkpoint. Raises CheckpointError for a checkpoint that does not verify.
        """
        folder = self.loop.checkpoints.folder
        checkpoint = Path(resume_from_checkpoint) if isinstance(resume_from_checkpoint, str) else None
        if resume_from_checkpoint is True:
            newest, _ = newest_whole(folder, self.loop.checkpoints.run)
            if newest is None:
                raise CheckpointError("no checkpoint in this folder verifies", where=str(folder))
            checkpoint = newest.folder
        self.loop.run(checkpoint)
        self._mirror_loop()

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Return the mean loss per supervised token over the held-out rows, packed as in training."""
        return self.loop.evaluate(eval_dataset if isinstance(eval_dataset, Rows) else None, metric_key_prefix)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the trained weights to `output_dir`, completely or not at all."""
        folder = Path(output_dir) if output_dir else Path(str(self.args.output_dir))
        self.loop.method.save(self.loop.model, folder, self.loop.config)

    def _mirror_loop(self) -> None:
        """Copy the loop's present state to the Trainer's attributes."""
        self.state, self.control = self.loop.state, self.loop.control
        self.optimizer, self.lr_scheduler = self.loop.optimizer, self.loop.lr_scheduler
