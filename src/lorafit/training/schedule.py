"""schedule: run a step's micro-batches through the model.

It sets the precision, the gradient scale and deterministic kernels.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn

from lorafit.engine import Graphs, MicroBatch, Step
from lorafit.errors import TrainingError
from lorafit.methods.full.sharding import is_sharded
from lorafit.objectives import Objective

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


@contextmanager
def deterministic(asked: bool) -> Iterator[None]:
    """Allow only deterministic kernels within the block, if `asked`.

    An operation without such a kernel raises TrainingError. cuBLAS reads its setting when CUDA starts in this process,
    so enter before the model is loaded.
    """
    if not asked:
        yield
        return
    os.environ.setdefault(WORKSPACE, ":4096:8")
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    # uninitialized memory is never read here, so filling it wastes time
    filled, memory.fill_uninitialized_memory = memory.fill_uninitialized_memory, False
    benchmark, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False
    torch.use_deterministic_algorithms(True)
    try:
        yield
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        raise TrainingError(
            f"an operation of this model has no deterministic kernel ({str(error).partition('.')[0]})",
            where="deterministic",
            fix="train without --deterministic; a resumed run then differs in the last bits",
        ) from error
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        memory.fill_uninitialized_memory = filled
        torch.backends.cudnn.benchmark = benchmark


class Part(NamedTuple):
    """Hold a part of a step.

    A part runs completely; if memory runs out in it, the whole step is repeated in a smaller layout.

    Attributes:
        largest: the part's micro-batch with the most tokens.
        run: runs forward and backward, adds to the gradients, and returns the part's loss (), detached.
    """

    largest: MicroBatch
    run: Callable[[], Tensor]


class Schedule(Protocol):
    """Run the micro-batches of a step in some order.

    Another schedule could run all micro-batches through one layer before the next, with streamed weights.
    """

    def parts(self, step: Step, scale: float) -> Iterator[Part]:
        """Yield the parts of `step` in order; losses and gradients are multiplied by `scale`."""
        ...


class OneByOne:
    """Run forward and backward of one micro-batch after another.

    With `graphs`, small micro-batches run as CUDA graphs.

    Attributes:
        scaler: the gradient scaler of fp16; it does nothing in other precisions.
        begin: called with the number of a step's micro-batches before they run.
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
        self.begin: Callable[[int], object] = lambda micro_batches: None

    def parts(self, step: Step, scale: float) -> Iterator[Part]:
        """Yield each micro-batch of `step`."""
        self.begin(len(step.micro_batches))
        counted = len(step.micro_batches) - step.idle
        for place, batch in enumerate(step.micro_batches):
            share = scale if place < counted else 0.0
            yield Part(batch, lambda batch=batch, share=share: self._run(batch, share))  # type: ignore[misc]

    def loss(self, batch: MicroBatch, scale: Tensor | float = 1.0) -> Tensor:
        """Return the summed loss of `batch` times `scale`, computed in the run's precision."""
        place = self.device.type
        mixed = torch.autocast(place, self.autocast) if self.autocast else contextlib.nullcontext()
        with mixed:
            return self.objective.loss(self.model, batch.to(self.device, non_blocking=True), scale)

    def forward_backward(self, batch: MicroBatch, scale: Tensor | float) -> Tensor:
        """Run forward and backward of `batch`, and return its loss times `scale`, detached."""
        loss = self.loss(batch, scale)
        self.scaler.scale(loss).backward()
        return loss.detach()

    def _run(self, batch: MicroBatch, scale: float) -> Tensor:
        if self.graphs is not None:
            return self.graphs.run(batch, scale, self.forward_backward)
        return self.forward_backward(batch, scale)


def autocast_dtype(model: nn.Module, device: torch.device) -> torch.dtype | None:
    """Return the half precision of `model` on a GPU; None if it computes in fp32."""
    if device.type != "cuda":
        return None
    dtype = compute_dtype(model)
    return None if dtype is torch.float32 else dtype


def compute_dtype(model: nn.Module) -> torch.dtype:
    """Return the half precision among the model's weights, else fp32. Shards may be wider than they compute."""
    if is_sharded(model):
        own: torch.dtype = cast(Any, model).dtype_of_shards
        return own
    halves = (weight.dtype for weight in model.parameters() if weight.dtype in (torch.bfloat16, torch.float16))
    return next(halves, torch.float32)
