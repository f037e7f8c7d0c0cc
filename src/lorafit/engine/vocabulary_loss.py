"""Cross entropy over the vocabulary in chunks: loss and gradient in one pass, logits never whole.

A chunk of hidden rows goes through the head, its logits turn into their own gradient, and that goes back through the
head at once (the idea of Liger Kernel's fused linear cross entropy, arXiv:2410.10989, section 3.2). The head is called
as a module: frozen, tied, trained or adapted, it takes one path.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lorafit.engine.families import LogitSteps
from lorafit.engine.loss_kernel import HAS_TRITON, losses_to_gradient

CHUNK_BYTES = 256 << 20
"""Largest size of one chunk's logits."""

IGNORED = -100
"""A target that has no loss and no gradient, as in torch."""

ROW_MULTIPLE = 16
"""Chunks have a multiple of so many rows, which is what matrix units want."""


def rows_per_chunk(vocabulary: int, itemsize: int) -> int:
    """Hidden rows whose logits, of `itemsize` bytes each, take CHUNK_BYTES at most (one row at least)."""
    rows = CHUNK_BYTES // (vocabulary * itemsize)
    return max(rows // ROW_MULTIPLE * ROW_MULTIPLE, min(rows, ROW_MULTIPLE), 1)


def chunked_loss(
    hidden: Tensor,
    targets: Tensor,
    head: nn.Module,
    steps: LogitSteps,
    chunk_rows: int | None = None,
    share: float | Tensor = 1.0,
) -> Tensor:
    """`share` times the sum over rows of the cross entropy of `steps(head(hidden))` against `targets`, in fp32.

    hidden (rows, hidden), targets (rows,) int64, IGNORED for rows that do not count, `head` maps (n, hidden) to
    (n, vocabulary). The gradient reaches `hidden` and the parameters of `head` that train; under no_grad only the loss
    is computed. `chunk_rows` is by default what CHUNK_BYTES allow. A `share` given here, not multiplied by afterwards,
    costs the gradient in half precision no rounding of its own; as a tensor () in fp32 it may change under a graph.
    """
    if chunk_rows is None:
        with torch.no_grad():
            empty = head(hidden[:0])  # tells vocabulary and dtype, under autocast and adapters too
        chunk_rows = rows_per_chunk(empty.shape[-1], empty.element_size())
    trained = [parameter for parameter in head.parameters() if parameter.requires_grad]
    differentiable = torch.is_grad_enabled()
    loss: Tensor = _ChunkedLoss.apply(hidden, targets, head, steps, chunk_rows, share, differentiable, *trained)
    return loss


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        targets: Tensor,
        head: nn.Module,
        steps: LogitSteps,
        chunk_rows: int,
        share: float | Tensor,
        differentiable: bool,
        *trained: Tensor,
    ) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if differentiable else None
        sums = [torch.zeros_like(weight, dtype=torch.float32) for weight in trained] if differentiable else []
        weight, ctx.power = _weight_and_power(share)
        for start in range(0, hidden.shape[0], chunk_rows):
            rows = slice(start, start + chunk_rows)
            if grad_hidden is None:
                losses, _ = losses_and_gradient(head(hidden[rows]), targets[rows], steps)
                total += losses.sum()
            else:
                losses, to_hidden, *to_trained = _chunk(hidden[rows], targets[rows], head, steps, weight, trained)
                total += losses.sum()
                grad_hidden[rows] = to_hidden
                for accumulated, grad in zip(sums, to_trained, strict=True):
                    accumulated += grad
        if grad_hidden is not None:
            ctx.save_for_backward(grad_hidden, *sums)
            ctx.dtypes = [weight.dtype for weight in trained]
        return total * share

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator, unused-ignore]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, *sums = ctx.saved_tensors
        factor = grad * ctx.power
        scaled = [(total * factor).to(dtype) for total, dtype in zip(sums, ctx.dtypes, strict=True)]
        return (grad_hidden * factor, None, None, None, None, None, None, *scaled)


Weight = float | Tensor


def _weight_and_power(share: Weight) -> tuple[Weight, Weight]:
    """`share` as a weight of 1 to 2 and a power of two.

    The gradient's logits take the weight in fp32 before they are rounded; the power, which rounds nothing, is left
    for the end, since fp16 would lose the logits of unlikely tokens below it.
    """
    if isinstance(share, Tensor):
        mantissas, exponents = torch.frexp(share)
        return 2.0 * mantissas, torch.ldexp(torch.ones_like(share), exponents - 1)
    mantissa, exponent = math.frexp(share)
    return 2.0 * mantissa, 2.0 ** (exponent - 1)


def _chunk(
    hidden: Tensor, targets: Tensor, head: nn.Module, steps: LogitSteps, weight: Weight, trained: tuple[Tensor, ...]
) -> list[Tensor]:
    """Losses (rows,) of a chunk, and `weight` times their sum's gradient in `hidden` and in each of `trained`."""
    with torch.enable_grad():
        leaf = hidden.detach().requires_grad_()
        logits = head(leaf)
    losses, grad_logits = losses_and_gradient(logits.detach(), targets, steps, weight)
    # an adapter that is switched off trains, yet takes no part
    grads = torch.autograd.grad(logits, (leaf, *trained), grad_logits, allow_unused=True, materialize_grads=True)
    return [losses, *grads]


def apply_steps(logits: Tensor, steps: LogitSteps) -> Tensor:
    """The family's logits in fp32, from what its head gave."""
    scaled = logits.float() * steps.scale
    return scaled if steps.cap is None else torch.tanh(scaled / steps.cap) * steps.cap


def losses_and_gradient(
    logits: Tensor, targets: Tensor, steps: LogitSteps, weight: Weight = 1.0
) -> tuple[Tensor, Tensor]:
    """Losses (rows,) in fp32, and `weight` times the gradient of their sum in `logits`, in its dtype.

    d loss / d z = (softmax - onehot) · (1 - tanh²(scale · z / cap)) · scale; 0 for IGNORED. `logits` is overwritten.
    """
    if HAS_TRITON and logits.is_cuda:
        return losses_to_gradient(logits, targets, steps, weight), logits
    return losses_and_gradient_in_torch(logits, targets, steps, weight)


def losses_and_gradient_in_torch(
    logits: Tensor, targets: Tensor, steps: LogitSteps, weight: Weight = 1.0
) -> tuple[Tensor, Tensor]:
    """The same, without a kernel of its own."""
    z = logits.float().mul_(steps.scale) if logits.dtype is not torch.float32 else logits.mul_(steps.scale)
    counts = targets[:, None] != IGNORED
    slope = torch.where(counts, steps.scale * weight, 0.0).to(z.dtype)
    if steps.cap is not None:
        z = z.div_(steps.cap).tanh_()
        slope = (1 - z * z).mul_(slope)
        z = z.mul_(steps.cap)
    normaliser = torch.logsumexp(z, dim=-1, keepdim=True)
    own = targets[:, None].where(counts, 0)
    losses = (normaliser - z.gather(1, own)).where(counts, 0.0)[:, 0]
    gradient = z.sub_(normaliser).exp_()
    gradient.scatter_add_(1, own, torch.full_like(normaliser, -1.0))
    return losses, gradient.mul_(slope).to(logits.dtype)
