"""Snapshot: the full state of a run after a step, copied to the host.

It is written to a checkpoint and restored from one.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from lorafit.config import RunConfig
from lorafit.methods import Method, MethodSnapshot
from lorafit.runs import ADAPTER

Tensors = dict[str, torch.Tensor]
OPTIMIZER, RANDOM = "optimizer.safetensors", "random.safetensors"
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
"""Fields of transformers' TrainerState that a resumed run needs, besides its history; every release has them."""
JSON_BYTES = 1 << 20
"""Bytes allowed for JSON when the size of a checkpoint is estimated."""


def optimizer_state(optimizer: Any) -> tuple[Tensors, dict[str, Any]]:
    """Return host copies of the optimizer's state, as tensors and JSON values.

    Tensors are named INDEX.NAME[.NAME] by parameter; the JSON values are {"groups", "scalars"}. bitsandbytes keeps
    uint8 moments with their block maxima and code books in a nested mapping, which the names follow.
    """
    state = optimizer.state_dict()
    tensors: Tensors = {}
    scalars: dict[str, Any] = {}
    _flatten(state["state"], "", tensors, scalars)
    groups = [{key: value for key, value in group.items() if key != "params"} for group in state["param_groups"]]
    return tensors, {"groups": groups, "scalars": scalars}


def restore_optimizer(optimizer: Any, tensors: Mapping[str, torch.Tensor], rest: Mapping[str, Any]) -> None:
    """Load the state that `optimizer_state` returned. Raises ValueError for other parameter groups."""
    now = optimizer.state_dict()["param_groups"]
    if len(now) != len(rest["groups"]):
        raise ValueError("the optimizer has other parameter groups")
    groups = [
        # JSON has no tuples, but the betas are a tuple
        {**_with_tuples(saved), "params": group["params"]}
        for saved, group in zip(rest["groups"], now, strict=True)
    ]
    optimizer.load_state_dict({"state": _unflatten({**tensors, **rest["scalars"]}), "param_groups": groups})
    _page_again(optimizer)


def _flatten(value: Mapping[Any, Any], prefix: str, tensors: Tensors, scalars: dict[str, Any]) -> None:
    for key, part in value.items():
        name = f"{prefix}.{key}" if prefix else str(key)
        if isinstance(part, torch.Tensor):
            tensors[name] = part.detach().to("cpu", copy=True).contiguous()
        elif isinstance(part, Mapping):
            _flatten(part, name, tensors, scalars)
        else:
            scalars[name] = part


def _unflatten(flat: Mapping[str, Any]) -> dict[int, Any]:
    state: dict[int, Any] = {}
    for name, value in flat.items():
        index, *path = name.split(".")
        place = state.setdefault(int(index), {})
        for key in path[:-1]:
            place = place.setdefault(key, {})
        place[path[-1]] = value
    return state


def _with_tuples(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in group.items()}


def _page_again(optimizer: Any) -> None:
    """Move the moments of a paged optimizer back into paged memory.

    Loading leaves them on the GPU.
    """
    if not getattr(optimizer, "is_paged", False):
        return
    for weight, state in optimizer.state.items():
        for name in ("state1", "state2"):
            if name in state:
                buffer = optimizer.get_state_buffer(weight, dtype=state[name].dtype)
                buffer.copy_(state[name])
                state[name] = buffer


GeneratorsState = tuple[dict[str, torch.Tensor], dict[str, Any]]


def generators_state() -> GeneratorsState:
    """Return the state of all random generators.

    torch's (CPU, and each visible GPU) are byte tensors; Python's and numpy's are JSON values.
    """
    tensors = {"cpu": torch.random.get_rng_state()}
    if torch.cuda.is_available():
        tensors |= {f"cuda.{gpu}": state.cpu() for gpu, state in enumerate(torch.cuda.get_rng_state_all())}
    version, words, gauss = random.getstate()
    name, keys, place, has_gauss, cached = np.random.get_state(legacy=True)
    numpy_state = [str(name), np.asarray(keys).tolist(), int(place), int(has_gauss), float(cached)]
    return tensors, {"python": [version, list(words), gauss], "numpy": numpy_state}


def restore_generators(tensors: Mapping[str, torch.Tensor], rest: Mapping[str, Any]) -> None:
    """Set every generator to its saved state. GPUs without a saved state keep theirs."""
    torch.random.set_rng_state(tensors["cpu"])
    if torch.cuda.is_available():
        for gpu in range(torch.cuda.device_count()):
            if f"cuda.{gpu}" in tensors:
                torch.cuda.set_rng_state(tensors[f"cuda.{gpu}"], gpu)
    version, words, gauss = rest["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, place, has_gauss, cached = rest["numpy"]
    np.random.set_state((name, np.array(keys, np.uint32), place, has_gauss, cached))


@dataclass(frozen=True, slots=True)
class RandomStreams:
    """Hold the random states of the CPU and the training GPU. Reading them does not wait for the GPU.

    Attributes:
        cpu: the CPU generator's state.
        gpu: the GPU generator's state; None on a CPU.
    """

    cpu: torch.Tensor
    gpu: torch.Tensor | None

    @classmethod
    def now(cls, device: torch.device) -> RandomStreams:
        """Return the present states."""
        gpu = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return cls(torch.random.get_rng_state(), gpu)

    def restore(self, device: torch.device) -> None:
        """Set the states back."""
        torch.random.set_rng_state(self.cpu)
        if self.gpu is not None:
            torch.cuda.set_rng_state(self.gpu, device)


class Resumable(Protocol):
    """Describe the parts of a training loop that a checkpoint holds."""

    model: torch.nn.Module
    config: RunConfig
    method: Method
    optimizer: Any
    lr_scheduler: Any
    scaler: Any

    @property
    def state(self) -> Any:
        """Return transformers' state of the run."""
        ...

    def resumable(self) -> dict[str, Any]:
        """Return the further state of a resumed run, as JSON values."""
        ...


@dataclass(frozen=True)
class Snapshot:
    """Hold a run's state after a step.

    Attributes:
        step: the step.
        eval_loss: the held-out loss at this step, if it was measured.
        trained: the trained weights, as the method keeps them.
        optimizer: the optimizer's moments.
        random: the states of torch's generators.
        trainer_state: transformers' TrainerState, history included.
        rest: JSON values: {"optimizer", "schedule", "scaler", "random", "run"}, with `run` from `resumable`.
    """

    step: int
    eval_loss: float | None
    trained: MethodSnapshot
    optimizer: Mapping[str, torch.Tensor]
    random: Mapping[str, torch.Tensor]
    trainer_state: Mapping[str, Any]
    rest: Mapping[str, Any]

    @classmethod
    def of(cls, loop: Resumable, generators_of: Sequence[GeneratorsState] = ()) -> Snapshot:
        """Copy the present state of `loop`. The copy waits for the GPU once, and is independent of further training.

        `generators_of` holds the random states of every process, by rank; by default of this one alone.
        """
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # paged moments are read from the host
        moments, optimizer_rest = optimizer_state(loop.optimizer)
        (generators, random_rest), *others = generators_of or [generators_state()]
        generators = {**generators, **_named_by_rank(others)}
        rest = {
            "optimizer": optimizer_rest,
            "schedule": _schedule(loop.lr_scheduler),
            "scaler": loop.scaler.state_dict() if loop.scaler.is_enabled() else None,
            "random": random_rest,
            "run": loop.resumable(),
        }
        if others:
            rest["random_of_others"] = [json_values for _, json_values in others]
        state = _trainer_state(loop.state)
        return cls(
            step=loop.state.global_step,
            eval_loss=_eval_loss(state),
            trained=loop.method.snapshot(loop.model, loop.config),
            optimizer=moments,
            random=generators,
            trainer_state=state,
            rest=json.loads(json.dumps(rest)),  # a copy, and proof that it is JSON
        )

    @property
    def is_last(self) -> bool:
        """Return True if nothing is left to train."""
        return bool(self.step >= self.trainer_state["max_steps"])

    @property
    def size_bytes(self) -> int:
        """Return the estimated bytes on disk, within JSON_BYTES and the length of the history."""
        tensors = [*self.optimizer.values(), *self.random.values()]
        history = 256 * len(self.trainer_state["log_history"])
        return self.trained.size_bytes + sum(tensor.nbytes for tensor in tensors) + history + JSON_BYTES

    def write(self, folder: Path) -> None:
        """Write every file into the empty `folder`. Raises OSError or SafetensorError if the disk refuses."""
        self.trained.require_finite(folder)
        (folder / ADAPTER).mkdir()
        self.trained.write(folder / ADAPTER)
        save_file(dict(self.optimizer), folder / OPTIMIZER)
        self.write_rest(folder)

    def write_rest(self, folder: Path) -> None:
        """Write all but weights and moments: random states, history and settings of the optimizer."""
        save_file(dict(self.random), folder / RANDOM)
        (folder / TRAINER_STATE).write_text(json.dumps(self.trainer_state, default=float), encoding="utf-8")
        (folder / REST).write_text(json.dumps(self.rest), encoding="utf-8")


def restore_optimization(loop: Resumable, folder: Path, moments: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Restore optimizer, with its `moments`, schedule and loss scale from a verified checkpoint.

    Returns the state that `resumable` returned.
    """
    rest = read_rest(folder)
    restore_optimizer(loop.optimizer, moments, rest["optimizer"])
    loop.lr_scheduler.load_state_dict({**loop.lr_scheduler.state_dict(), **rest["schedule"]})
    if rest["scaler"] is not None and loop.scaler.is_enabled():
        loop.scaler.load_state_dict(rest["scaler"])
    known = rest["run"]
    assert isinstance(known, dict)
    return known


def restore_randomness(folder: Path, rank: int) -> bool:
    """Set every random generator to its state in a verified checkpoint; False if it has none of process `rank`."""
    tensors, rest = load_file(folder / RANDOM), read_rest(folder)
    if rank == 0:
        restore_generators(tensors, rest["random"])
        return True
    others = rest.get("random_of_others", [])
    if rank > len(others):
        return False
    prefix = f"{rank}."
    own = {name.removeprefix(prefix): state for name, state in tensors.items() if name.startswith(prefix)}
    restore_generators(own, others[rank - 1])
    return True


def _named_by_rank(others: Sequence[GeneratorsState]) -> Tensors:
    return {f"{rank}.{name}": state for rank, (own, _) in enumerate(others, 1) for name, state in own.items()}


def read_rest(folder: Path) -> dict[str, Any]:
    """Return the JSON values of a verified checkpoint."""
    rest = json.loads((folder / REST).read_text(encoding="utf-8"))
    assert isinstance(rest, dict)
    return rest


def _schedule(scheduler: Any) -> dict[str, Any]:
    # the lambdas are rebuilt from the settings, which the fingerprint keeps equal
    return {key: value for key, value in scheduler.state_dict().items() if key != "lr_lambdas"}


def _trainer_state(state: Any) -> dict[str, Any]:
    # a copy of the list is enough, since its entries never change
    return {name: getattr(state, name) for name in STATE_FIELDS} | {"log_history": list(state.log_history)}


def _eval_loss(state: Mapping[str, Any]) -> float | None:
    """Return the held-out loss measured at exactly this step, None without one."""
    for entry in reversed(state["log_history"]):
        if entry.get("step") != state["global_step"]:
            return None
        if "eval_loss" in entry:
            loss = float(entry["eval_loss"])
            return loss if loss == loss and abs(loss) != float("inf") else None
    return None
