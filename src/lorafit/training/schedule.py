"""How a step's micro-batches walk through the model: precision, gradient scale, deterministic kernels."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from lorafit.engine import Graphs, MicroBatch, Step
from lorafit.errors import TrainingError
from lorafit.objectives import Objective

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


@contextmanager
def deterministic(asked: bool) -> Iterator[None]:
    """Within it torch runs only kernels that give the same bits each time; nothing changes unless `asked`.

    An operation that has no such kernel raises TrainingError. cuBLAS reads its setting when CUDA starts in this
    process, so enter before the model is loaded.
    """
    if not asked:
        yield
        return
    os.environ.setdefault(WORKSPACE, ":4096:8")
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    # nothing here reads memory that it has not written
    filled, memory.fill_uninitialized_memory = memory.fill_uninitialized_memory, False
    benchmark, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False
    torch.use_deterministic_algorithms(True)
    try:
        yield
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        raise TrainingError(
            f"an operation of this model has no deterministic form ({str(error).partition('.')[0]})",
            where="deterministic",
            fix="train without --deterministic; a resumed run then differs in the last bits",
        ) from error
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        memory.fill_uninitialized_memory = filled
        torch.backends.cudnn.benchmark = benchmark


class Part(NamedTuple):
    """A piece of a step that runs whole or not at all; when memory runs out in it, the step is laid out anew.

    Attributes:
        largest: the micro-batch of the piece with the most tokens.
        run: forward and backward; returns the piece's loss (), detached, and adds to the gradients.
    """

    largest: MicroBatch
    run: Callable[[], Tensor]


class Schedule(Protocol):
    """The door for other walks: all micro-batches through one layer before the next, its weights streamed."""

    def parts(self, step: Step, scale: float) -> Iterator[Part]:
        """Yield the pieces of `step` in the order they run; losses and gradients are multiplied by `scale`."""
        ...


class OneByOne:
    """Forward and backward of one micro-batch after another; small ones as CUDA graphs where there are `graphs`.

    Attributes:
        scaler: keeps small gradients of fp16 from vanishing; does nothing in other precisions.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        device: torch.device,
        *,
        autocast: torch.dtype | None = None,
        graphs: Graphs | None = None,
    ) -> None:
        self.model, self.objective, self.device = model, objective, device
        self.autocast, self.graphs = autocast, graphs
        self.scaler: Any = torch.amp.GradScaler("cuda", enabled=autocast is torch.float16)

    def parts(self, step: Step, scale: float) -> Iterator[Part]:
        """Yield each micro-batch of `step`."""
        for batch in step.micro_batches:
            yield Part(batch, lambda batch=batch: self._run(batch, scale))  # type: ignore[misc]

    def loss(self, batch: MicroBatch, scale: Tensor | float = 1.0) -> Tensor:
        """Return the summed loss of `batch` times `scale`, computed in the run's precision."""
        place = self.device.type
        mixed = torch.autocast(place, self.autocast) if self.autocast else contextlib.nullcontext()
        with mixed:
            return self.objective.loss(self.model, batch.to(self.device, non_blocking=True), scale)

    def there_and_back(self, batch: MicroBatch, scale: Tensor | float) -> Tensor:
        """Forward and backward of `batch`; returns its loss times `scale`, detached."""
        loss = self.loss(batch, scale)
        self.scaler.scale(loss).backward()
        return loss.detach()

    def _run(self, batch: MicroBatch, scale: float) -> Tensor:
        if self.graphs is not None:
            return self.graphs.run(batch, scale, self.there_and_back)
        return self.there_and_back(batch, scale)


def autocast_dtype(model: nn.Module, device: torch.device) -> torch.dtype | None:
    """Return the half precision that `model` computes in on a GPU; None where it computes in fp32."""
    if device.type != "cuda":
        return None
    dtype = compute_dtype(model)
    return None if dtype is torch.float32 else dtype


def compute_dtype(model: nn.Module) -> torch.dtype:
    """Return the half precision among the model's weights, else fp32."""
    halves = (weight.dtype for weight in model.parameters() if weight.dtype in (torch.bfloat16, torch.float16))
    return next(halves, torch.float32)
