"""Loss kernel: one Triton kernel for the losses of a chunk of logits and their gradient.

The gradient is written over the logits. One sweep computes the softmax (Milakov and Gimelshein, arXiv:1805.02867),
and a second sweep writes; both in fp32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lorafit.engine.loss.logit_rules import LogitSteps

triton: Any
tl: Any
try:
    import triton  # type: ignore[import-not-found, import-untyped, unused-ignore, no-redef]
    import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore, no-redef]

    HAS_TRITON = True
except ImportError:  # CPU builds of torch come without it
    triton = tl = None
    HAS_TRITON = False

BLOCK, WARPS = 4096, 8


def losses_to_gradient(logits: Tensor, targets: Tensor, steps: LogitSteps, weight: float | Tensor = 1.0) -> Tensor:
    """Return losses (rows,) in fp32, and overwrite `logits` with their gradient.

    `logits` (rows, vocabulary) becomes `weight` times the gradient of the losses' sum. `weight` may be a tensor () in
    fp32 on the same device. A target of -100 has neither loss nor gradient; any other target outside the vocabulary
    gives an infinite loss.
    """
    assert logits.stride(-1) == 1 and logits.shape[0] == targets.shape[0], (logits.stride(), targets.shape)
    rows, vocabulary = logits.shape
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    if rows:
        capped, cap = steps.cap is not None, steps.cap or 1.0
        slope = steps.scale * weight
        if not isinstance(slope, Tensor):
            slope = torch.full((), slope, dtype=torch.float32, device=logits.device)
        block = min(BLOCK, triton.next_power_of_2(vocabulary))
        with torch.cuda.device_of(logits):
            _cross_entropy[(rows,)](
                logits, targets, losses, logits.stride(0), steps.scale, slope, cap,
                capped, vocabulary, block, num_warps=WARPS,
            )  # fmt: skip
        if not logits.is_inference():
            torch.autograd.graph.increment_version(logits)  # autograd must not use saved logits
    return losses


if HAS_TRITON:

    @triton.jit
    def _adjusted(z, scale, cap, CAPPED: tl.constexpr):  # type: ignore[no-untyped-def]
        """Return the family's logits, and tanh(scale · z / cap), of the head's outputs."""
        z = z.to(tl.float32) * scale
        t = z * 0.0
        if CAPPED:
            t = 1.0 - 2.0 / (1.0 + tl.exp(2.0 * z / cap))  # tanh; exact at both ends
            z = t * cap
        return z, t

    @triton.jit
    def _cross_entropy(  # type: ignore[no-untyped-def]
        logits, targets, losses, stride, scale, slope, cap,
        CAPPED: tl.constexpr, VOCABULARY: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        place = logits + row * stride
        target = tl.load(targets + row)
        steepness = tl.where(target == -100, 0.0, tl.load(slope))
        lanes = tl.arange(0, BLOCK)
        # a running maximum and sum for each lane need one reduction over lanes at the end, not one a block
        top = tl.full((BLOCK,), -3.0e38, tl.float32)
        total = tl.zeros((BLOCK,), tl.float32)
        own = tl.full((BLOCK,), float("-inf"), tl.float32)
        for start in range(0, VOCABULARY, BLOCK):
            at = start + lanes
            z, _ = _adjusted(tl.load(place + at, mask=at < VOCABULARY, other=0.0), scale, cap, CAPPED)
            z = tl.where(at < VOCABULARY, z, float("-inf"))
            higher = tl.maximum(top, z)
            total = total * tl.exp(top - higher) + tl.exp(z - higher)
            top = higher
            own = tl.where(at == target, z, own)
        highest = tl.max(top, 0)
        normaliser = highest + tl.log(tl.sum(total * tl.exp(top - highest), 0))
        loss = normaliser - tl.max(own, 0)
        tl.store(losses + row, tl.where(target == -100, 0.0, loss))
        for start in range(0, VOCABULARY, BLOCK):
            at = start + lanes
            z, t = _adjusted(tl.load(place + at, mask=at < VOCABULARY, other=0.0), scale, cap, CAPPED)
            gradient = (tl.exp(z - normaliser) - tl.where(at == target, 1.0, 0.0)) * steepness
            if CAPPED:
                gradient = gradient * (1.0 - t * t)
            tl.store(place + at, gradient.to(logits.dtype.element_ty), mask=at < VOCABULARY)
