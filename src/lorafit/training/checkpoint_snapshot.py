"""Snapshot: all that a run is after a step, copied to the host; written to a checkpoint, and restored from one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from lorafit.methods.lora import AdapterSnapshot
from lorafit.training.generators import generators_state, restore_generators
from lorafit.training.optimizer_state import optimizer_state, restore_optimizer

ADAPTER, OPTIMIZER, RANDOM = "adapter", "optimizer.safetensors", "random.safetensors"
TRAINER_STATE, REST = "trainer_state.json", "state.json"
STATE_FIELDS = (
    "epoch",
    "global_step",
    "max_steps",
    "num_train_epochs",
    "logging_steps",
    "eval_steps",
    "save_steps",
    "train_batch_size",
    "total_flos",
    "num_input_tokens_seen",
)
"""What of transformers' TrainerState a resumed run needs, besides its history; every release has these."""
JSON_BYTES = 1 << 20
"""Room allowed for what is not a tensor when the space of a checkpoint is estimated."""


@dataclass(frozen=True)
class Snapshot:
    """The adapter, the optimizer's moments, schedule, random states and the Trainer's own state at `step`.

    `rest` holds what is no tensor: {"optimizer", "schedule", "scaler", "random", "run"}; `run` is whatever else
    the trainer must know (`LorafitTrainer.resumable`).
    """

    step: int
    eval_loss: float | None
    adapter: AdapterSnapshot
    optimizer: Mapping[str, torch.Tensor]
    random: Mapping[str, torch.Tensor]
    trainer_state: Mapping[str, Any]
    rest: Mapping[str, Any]

    @classmethod
    def of(cls, trainer: Any) -> Snapshot:
        """Copy `trainer` as it stands. Waits for the card once; nothing of the copy changes as training goes on."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # paged moments are read from the host
        moments, optimizer_rest = optimizer_state(trainer.optimizer)
        generators, random_rest = generators_state()
        rest = {
            "optimizer": optimizer_rest,
            "schedule": _schedule(trainer.lr_scheduler),
            "scaler": _scaler(trainer),
            "random": random_rest,
            "run": trainer.resumable(),
        }
        state = _trainer_state(trainer.state)
        return cls(
            step=trainer.state.global_step,
            eval_loss=_eval_loss(state),
            adapter=AdapterSnapshot.of(trainer.model, trainer.config, base_name=trainer.config.base),
            optimizer=moments,
            random=generators,
            trainer_state=state,
            rest=json.loads(json.dumps(rest)),  # a copy, and proof that it is JSON
        )

    @property
    def is_last(self) -> bool:
        """True when nothing is left to train."""
        return bool(self.step >= self.trainer_state["max_steps"])

    @property
    def size_bytes(self) -> int:
        """Bytes on disk, within JSON_BYTES and the length of the history."""
        tensors = [*self.optimizer.values(), *self.random.values()]
        history = 256 * len(self.trainer_state["log_history"])
        return self.adapter.size_bytes + sum(tensor.nbytes for tensor in tensors) + history + JSON_BYTES

    def write(self, folder: Path) -> None:
        """Write every file into the empty `folder`. OSError or SafetensorError when the disk refuses."""
        self.adapter.require_finite(folder)
        (folder / ADAPTER).mkdir()
        self.adapter.write(folder / ADAPTER)
        save_file(dict(self.optimizer), folder / OPTIMIZER)
        save_file(dict(self.random), folder / RANDOM)
        (folder / TRAINER_STATE).write_text(json.dumps(self.trainer_state, default=float), encoding="utf-8")
        (folder / REST).write_text(json.dumps(self.rest), encoding="utf-8")


def restore_training(trainer: Any, folder: Path) -> None:
    """Optimizer, schedule, loss scale and what `resumable` gave, from a verified checkpoint; the adapter is apart."""
    rest = read_rest(folder)
    restore_optimizer(trainer.optimizer, load_file(folder / OPTIMIZER), rest["optimizer"])
    trainer.lr_scheduler.load_state_dict({**trainer.lr_scheduler.state_dict(), **rest["schedule"]})
    if rest["scaler"] is not None and trainer.accelerator.scaler is not None:
        trainer.accelerator.scaler.load_state_dict(rest["scaler"])
    trainer.resume_with(rest["run"])


def restore_randomness(folder: Path) -> None:
    """The random states of a verified checkpoint."""
    restore_generators(load_file(folder / RANDOM), read_rest(folder)["random"])


def read_rest(folder: Path) -> dict[str, Any]:
    """What of a verified checkpoint is no tensor."""
    rest = json.loads((folder / REST).read_text(encoding="utf-8"))
    assert isinstance(rest, dict)
    return rest


def _schedule(scheduler: Any) -> dict[str, Any]:
    # the lambdas are made again from the settings, which the fingerprint holds to be the same
    return {key: value for key, value in scheduler.state_dict().items() if key != "lr_lambdas"}


def _scaler(trainer: Any) -> dict[str, Any] | None:
    scaler = trainer.accelerator.scaler
    return scaler.state_dict() if scaler is not None and scaler.is_enabled() else None


def _trainer_state(state: Any) -> dict[str, Any]:
    # the list is copied, its entries never change
    return {name: getattr(state, name) for name in STATE_FIELDS} | {"log_history": list(state.log_history)}


def _eval_loss(state: Mapping[str, Any]) -> float | None:
    """The held-out loss measured at this very step, if it was."""
    for entry in reversed(state["log_history"]):
        if entry.get("step") != state["global_step"]:
            return None
        if "eval_loss" in entry:
            loss = float(entry["eval_loss"])
            return loss if loss == loss and abs(loss) != float("inf") else None
    return None
