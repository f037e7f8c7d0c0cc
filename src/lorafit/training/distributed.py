"""Processes: the rank of this process, and the sums and decisions that all processes share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn


class Processes:
    """Hold the processes that train one model, each on its share of a step's micro-batches.

    With one process every call returns its argument at once. Decisions go through the hosts (gloo), so that none waits
    for a GPU; gradients and losses are summed on their own device.

    Attributes:
        rank: the number of this process, from 0.
        world: the number of processes.
    """

    def __init__(self) -> None:
        together = torch.distributed.is_available() and torch.distributed.is_initialized()
        self.rank = torch.distributed.get_rank() if together else 0
        self.world = torch.distributed.get_world_size() if together else 1
        self._hosts: Any = torch.distributed.new_group(backend="gloo") if self.world > 1 else None

    @property
    def is_main(self) -> bool:
        """Return True in the one process that writes checkpoints, logs and results."""
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Return True if `flag` is set in any process, as for stops, saves and retries."""
        return bool(self._agreed(int(flag), torch.distributed.ReduceOp.MAX)) if self.world > 1 else flag

    def least(self, number: int) -> int:
        """Return the minimum of `number` over all processes: the layout that fits them all."""
        return self._agreed(number, torch.distributed.ReduceOp.MIN) if self.world > 1 else number

    def total(self, value: torch.Tensor) -> torch.Tensor:
        """Return the sum of `value` over all processes, on its device."""
        if self.world > 1:
            value = value.clone()
            torch.distributed.all_reduce(value)
        return value

    def add_gradients(self, trained: Sequence[nn.Parameter]) -> None:
        """Replace each weight's gradient by its sum over all processes, in one message."""
        if self.world == 1:
            return
        for weight in trained:
            if weight.grad is None:  # this process had no micro-batch
                weight.grad = torch.zeros_like(weight)
        gradients = [weight.grad for weight in trained if weight.grad is not None]
        whole = torch.cat([gradient.flatten() for gradient in gradients])
        torch.distributed.all_reduce(whole)
        parts = whole.split([gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))

    def _agreed(self, number: int, operation: Any) -> int:
        value = torch.tensor(number)
        torch.distributed.all_reduce(value, op=operation, group=self._hosts)
        return int(value)
