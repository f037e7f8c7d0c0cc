"""StepLog: what each step measured, brought from the device one step late, so that nothing waits for it."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True, slots=True)
class StepNumbers:
    """One optimizer step: its mean loss per supervised token, the gradient norm before clipping, and its rows."""

    step: int
    epoch: float
    learning_rate: float
    tokens: int
    rows: tuple[int, ...]
    loss: float = math.nan
    grad_norm: float = math.nan

    @property
    def is_finite(self) -> bool:
        """False when the step's update was withheld."""
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
    """A queue of steps whose numbers are on their way to the host.

    `push` starts an asynchronous copy into pinned memory and returns at once. `ready` waits for all but the newest
    step, `flush` for all of them; each step comes out once, in order. So the host may run one step ahead of the card.
    """

    def __init__(self) -> None:
        self.awaited: deque[_Awaited] = deque()

    def push(self, numbers: StepNumbers, measured: torch.Tensor) -> None:
        """Queue a step; `measured` (2,) holds its loss and gradient norm, wherever they were computed."""
        on_card = measured.is_cuda
        host = torch.empty(measured.shape, dtype=measured.dtype, pin_memory=on_card)
        host.copy_(measured, non_blocking=on_card)
        copied = torch.cuda.Event() if on_card else None
        if copied is not None:
            copied.record(torch.cuda.current_stream(measured.device))
        self.awaited.append(_Awaited(numbers, host, copied))

    def ready(self) -> list[StepNumbers]:
        """Every step but the newest."""
        return [self.awaited.popleft().arrived() for _ in range(len(self.awaited) - 1)]

    def flush(self) -> list[StepNumbers]:
        """Every step: for evaluation, saving and the end."""
        return [self.awaited.popleft().arrived() for _ in range(len(self.awaited))]

    def drop(self) -> None:
        """Forget what has not come out: for a step that is being done again."""
        self.awaited.clear()
