"""progress: the numbers of each step, one step late, and the progress shown to watchers."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True, slots=True)
class StepNumbers:
    """Hold the numbers of one optimizer step.

    Attributes:
        step: the step.
        epoch: epochs done after this step.
        learning_rate: the learning rate of the step.
        tokens: packed tokens.
        rows: row numbers.
        loss: mean loss per supervised token.
        grad_norm: the gradient norm before clipping.
    """

    step: int
    epoch: float
    learning_rate: float
    tokens: int
    rows: tuple[int, ...]
    loss: float = math.nan
    grad_norm: float = math.nan

    @property
    def is_finite(self) -> bool:
        """Return False if the step's update was withheld."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


@dataclass(frozen=True, slots=True)
class _Awaited:
    numbers: StepNumbers
    host: torch.Tensor  # (2,): loss, gradient norm
    copied: torch.cuda.Event | None

    def arrived(self) -> StepNumbers:
        if self.copied is not None:
            self.copied.synchronize()
        loss, grad_norm = self.host.tolist()
        return replace(self.numbers, loss=loss, grad_norm=grad_norm)


class StepLog:
    """Queue the steps whose numbers are on their way to the host.

    `push` starts an asynchronous copy into pinned memory and returns at once. `ready` waits for all but the newest
    step, `flush` for all of them; each step comes out once, in order. So the host may run one step ahead of the GPU.
    """

    def __init__(self) -> None:
        self.awaited: deque[_Awaited] = deque()

    def push(self, numbers: StepNumbers, measured: torch.Tensor) -> None:
        """Queue a step. `measured` (2,) holds its loss and gradient norm, on any device."""
        on_gpu = measured.is_cuda
        host = torch.empty(measured.shape, dtype=measured.dtype, pin_memory=on_gpu)
        host.copy_(measured, non_blocking=on_gpu)
        copied = torch.cuda.Event() if on_gpu else None
        if copied is not None:
            copied.record(torch.cuda.current_stream(measured.device))
        self.awaited.append(_Awaited(numbers, host, copied))

    def ready(self) -> list[StepNumbers]:
        """Return every step but the newest."""
        return [self.awaited.popleft().arrived() for _ in range(len(self.awaited) - 1)]

    def flush(self) -> list[StepNumbers]:
        """Return every step, for evaluation, saving and the end."""
        return [self.awaited.popleft().arrived() for _ in range(len(self.awaited))]

    def drop(self) -> None:
        """Forget the queued steps, since they are done again."""
        self.awaited.clear()


@dataclass(frozen=True, slots=True)
class StepProgress:
    """Hold the progress of training after a step.

    Attributes:
        step: the step.
        steps: steps of the whole run.
        loss: mean loss per supervised token.
        learning_rate: the learning rate of the step.
        tokens_per_s: packed tokens a second of training time.
        memory_bytes: peak memory.
        eta_s: seconds left.
        eval_loss: the newest held-out loss.
    """

    step: int
    steps: int
    loss: float
    learning_rate: float
    tokens_per_s: float
    memory_bytes: int
    eta_s: float
    eval_loss: float | None = None


class TrainingProgress:
    """Call `show` after every step. Speed counts packed tokens over training time."""

    def __init__(self, show: Callable[[StepProgress], None], clock: TrainingClock) -> None:
        self.show, self.clock = show, clock
        self.tokens, self.steps = 0, 0  # of this process, since a resumed run measures its own speed
        self.eval_loss: float | None = None

    def evaluated(self, eval_loss: float) -> None:
        """Keep the newest held-out loss, to show it with later steps."""
        self.eval_loss = eval_loss

    def step(self, numbers: StepNumbers, steps: int) -> None:
        """Show a step whose numbers have arrived; `steps` is the run's total."""
        self.tokens, self.steps = self.tokens + numbers.tokens, self.steps + 1
        elapsed_s = max(self.clock.elapsed_s, 1e-9)
        self.show(
            StepProgress(
                step=numbers.step,
                steps=steps,
                loss=numbers.loss,
                learning_rate=numbers.learning_rate,
                tokens_per_s=self.tokens / elapsed_s,
                memory_bytes=memory_in_use(),
                eta_s=(steps - numbers.step) * elapsed_s / self.steps,
                eval_loss=self.eval_loss,
            )
        )


def memory_in_use() -> int:
    """Return the peak bytes: reserved on the GPU, or resident in this process without one."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_reserved())
    scale = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is bytes on macOS, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


class TrainingClock:
    """Count seconds from `start`, except within `stopped()`."""

    def __init__(self) -> None:
        self.started: float | None = None
        self.counted_s = 0.0

    def start(self) -> None:
        """Start the clock; a running clock keeps running."""
        if self.started is None:
            self.started = time.perf_counter()

    def stop(self) -> None:
        """Stop the clock."""
        self.counted_s, self.started = self.elapsed_s, None

    @property
    def elapsed_s(self) -> float:
        """Return the seconds counted so far."""
        return self.counted_s + (time.perf_counter() - self.started if self.started is not None else 0.0)

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Stop the clock within the block."""
        was_running = self.started is not None
        self.stop()
        try:
            yield
        finally:
            if was_running:
                self.start()
