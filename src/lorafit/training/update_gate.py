"""The gate before the optimizer: an update whose loss or gradient is not finite never happens."""

from __future__ import annotations

from typing import Any

import torch


def withhold_unless_finite(optimizer: Any, measured: torch.Tensor) -> None:
    """Arrange that the next `optimizer.step()` changes nothing when any of `measured` (loss, norm) is not finite.

    Weights, moments and step counts then stay bit for bit as they were. torch's fused optimizers take the verdict as
    a tensor (`found_inf`, the protocol of GradScaler: torch/optim/adam.py), so the host need not know it. Others,
    bitsandbytes' 8-bit ones among them, wait for the card in their own step: there the verdict is read, and taking the
    gradients away makes them pass every parameter over. The learning rate's schedule moves on all the same.
    """
    inner = optimizer
    while hasattr(inner, "optimizer"):  # accelerate's wrapper
        inner = inner.optimizer
    bad = torch.isfinite(measured).all().logical_not()
    if inner.defaults.get("fused"):
        inner.found_inf = bad.to(torch.float32)
    elif bool(bad):
        for group in inner.param_groups:
            for weight in group["params"]:
                weight.grad = None
