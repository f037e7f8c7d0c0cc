"""updates: the part of a step that depends on the kind of optimizer, and the memory that an optimizer will take."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from lorafit.config import RunConfig
from lorafit.errors import TrainingError
from lorafit.memory.inputs import MASTER_BYTES, moment_bytes
from lorafit.methods.full.in_backward import StepInBackward, updates_in_backward
from lorafit.methods.full.sharding import own_shard
from lorafit.training.distributed import LOST, Processes


def begin_of(optimizer: Any, most: float) -> Callable[[int], None]:
    """Return the function that a schedule calls with the number of a step's micro-batches before it runs them."""
    if isinstance(optimizer, StepInBackward):
        return lambda micro_batches: optimizer.begin(micro_batches, most or math.inf)
    return lambda micro_batches: None


def clip(optimizer: Any, trained: Sequence[nn.Parameter], most: float, processes: Processes) -> Tensor:
    """Clip the gradients of `trained` to a norm of `most`, and return their norm before (), over all processes.

    A weight that the backward pass has updated was clipped by itself.
    """
    if isinstance(optimizer, StepInBackward):
        return optimizer.finish()
    return processes.clip(trained, most or math.inf)


def undo(optimizer: Any, trained: Sequence[nn.Parameter]) -> None:
    """Drop the gradients of a try that failed. Raises TrainingError if it has updated some weights already."""
    if isinstance(optimizer, StepInBackward) and optimizer.is_torn:
        raise TrainingError(
            "the memory ran out within a step whose first weights are updated already",
            where="gpu_memory",
            fix=f"set a smaller max_length or gpu_memory, and {LOST}",
        )
    for weight in trained:
        weight.grad = None


def updated_at_once(trained: Sequence[Tensor], config: RunConfig) -> list[Tensor]:
    """Return the weights whose gradients the backward pass consumes: all of `trained`, or in most runs none."""
    return list(trained) if config.method == "full" and updates_in_backward(config.optimizer, trained) else []


def coming_bytes(trained: Sequence[Tensor], config: RunConfig) -> int:
    """Return the bytes of gradients, moments and master copies of `trained` on this GPU, which do not exist yet."""
    if updated_at_once(trained, config):
        return 0
    moments = moment_bytes(config.optimizer)
    return round(sum(own_shard(weight).numel() * (moments + _held_bytes(weight, config)) for weight in trained))


def _held_bytes(weight: Tensor, config: RunConfig) -> int:
    """Return the bytes that one value of a trained weight takes beside its moments: gradient and master copy."""
    has_master = weight.element_size() < MASTER_BYTES and config.optimizer == "adamw"
    return weight.element_size() + (MASTER_BYTES if has_master else 0)
