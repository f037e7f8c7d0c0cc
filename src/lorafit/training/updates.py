"""updates: what an optimizer that updates weights within the backward pass asks of the loop."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from lorafit.errors import TrainingError
from lorafit.methods.full.in_backward import StepInBackward
from lorafit.training.distributed import LOST, Processes


def begin_of(optimizer: Any, most: float) -> Callable[[int], None]:
    """Return what a schedule calls with the number of a step's micro-batches before it runs them."""
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
