"""A Triton kernel of AdamW with 8-bit moments for bf16 weights. Import this module only if Triton is installed.

bitsandbytes' own kernel takes fp32 weights and gradients, or rounds updates of bf16 weights to nearest, which loses
most of them. This one reads and writes each number once, and rounds weights stochastically. Moments, scales and code
tables are bitsandbytes' (Dettmers et al., arXiv:2110.02861): blocks of 256 values, each with its largest magnitude.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]
from torch import Tensor

# mypy: disable-error-code="no-untyped-def, index"

BLOCK = 256
"""Values that share a scale."""
BLOCKS = 2
"""Blocks of one program. Two of them in two warps were fastest on an H200."""


@triton.jit
def _nearest_code(size, FIRST: tl.constexpr):
    """Return the place of the table's magnitude nearest to `size`, from 0 to 1; 0 is zero itself.

    The table has seven decades up to 1. The lowest has FIRST values, each further one twice as many, and they lie
    evenly between a tenth of the decade's end and its end.
    """
    values, end = tl.full(size.shape, FIRST, tl.float32), tl.full(size.shape, 1e-6, tl.float32)
    for _ in tl.static_range(6):
        is_above = size > end * (1.0 + 0.9 / values)  # between the last value of a decade and the next one's first
        values, end = tl.where(is_above, values * 2, values), tl.where(is_above, end * 10, end)
    within = tl.minimum(tl.maximum((size / end - 0.1) * (values / 0.9), 0.0), values - 1)
    place = values - FIRST + 1 + tl.floor(within)
    return tl.where(size < 1e-6 * (0.05 + 0.225 / FIRST), 0.0, place).to(tl.int32)


@triton.jit
def _scaled(moment, scale):
    """Return `moment` (blocks, BLOCK) in units of its block's `scale` (blocks, 1), where zero blocks stay zero."""
    return moment / tl.where(scale == 0.0, 1.0, scale)


@triton.jit
def _signed_code(moment, scale):
    """Return the codes of signed values. A negative one never becomes zero, as in bitsandbytes."""
    part = _scaled(moment, scale)
    size = tl.abs(part)
    place = _nearest_code(size, 1)
    below = 127 - tl.maximum(place, 1)
    above = tl.where(size > 1.0 - 0.225 / 64, 255, 127 + place)
    return tl.where(part < 0.0, below, above)


@triton.jit
def _unsigned_code(moment, scale):
    """Return the codes of values that are not negative."""
    size = _scaled(moment, scale)
    return tl.where(size > 1.0 - 0.225 / 128, 255, _nearest_code(size, 2))


@triton.jit
def _chances(seed, first, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):
    """Return random integers (BLOCKS, BLOCK), for values from `first` on."""
    a, b, c, d = tl.randint4x(seed, (first // 4).to(tl.int32) + tl.arange(0, BLOCKS * BLOCK // 4))
    return tl.reshape(tl.join(tl.join(a, b), tl.join(c, d)), (BLOCKS, BLOCK))


@triton.jit
def _rounded(wide, chance):
    """Return fp32 `wide` in bf16, up or down by the low 16 bits of `chance`; what is not finite stays."""
    bits = wide.to(tl.int32, bitcast=True)
    moved = ((bits + (chance & 0xFFFF).to(tl.int32)) & -65536).to(tl.float32, bitcast=True)
    return tl.where((bits & 0x7F800000) != 0x7F800000, moved, wide).to(tl.bfloat16)


@triton.jit
def _adam_8bit(
    weight, gradient, state1, state2, absmax1, absmax2, qmap1, qmap2, seed,
    beta1, beta2, step_size, epsilon, kept, count, first, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)[:, None]
    place = block * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask, mask_scale = place < count, block * BLOCK < count
    change = tl.load(gradient + place, mask, other=0.0).to(tl.float32)
    code1, code2 = tl.load(state1 + place, mask, other=127), tl.load(state2 + place, mask, other=0)
    scale1 = tl.load(absmax1 + block, mask_scale, other=0.0)
    scale2 = tl.load(absmax2 + block, mask_scale, other=0.0)
    mean = tl.load(qmap1 + code1.to(tl.int32)) * scale1 * beta1 + (1.0 - beta1) * change
    square = tl.load(qmap2 + code2.to(tl.int32)) * scale2 * beta2 + (1.0 - beta2) * change * change

    wide = tl.load(weight + place, mask, other=0.0).to(tl.float32)
    wide = (wide + step_size * (mean / (tl.sqrt(square) + epsilon))) * kept
    start = first + tl.program_id(0).to(tl.int64) * BLOCKS * BLOCK
    tl.store(weight + place, _rounded(wide, _chances(tl.load(seed), start, BLOCK, BLOCKS)), mask)

    scale1, scale2 = tl.max(tl.abs(mean), 1, keep_dims=True), tl.max(square, 1, keep_dims=True)
    tl.store(state1 + place, _signed_code(mean, scale1).to(tl.uint8), mask)
    tl.store(state2 + place, _unsigned_code(square, scale2).to(tl.uint8), mask)
    tl.store(absmax1 + block, scale1, mask_scale)
    tl.store(absmax2 + block, scale2, mask_scale)


def adam_8bit(
    weight: Tensor, gradient: Tensor, state: Mapping[str, Any], *, settings: Mapping[str, Any], seed: Tensor, first: int
) -> None:
    """Update `weight` (n,) in bf16 and its 8-bit moments by `gradient` (n,), as bitsandbytes' AdamW does.

    Args:
        weight: values of a weight from number `first` on, contiguous; they are rounded stochastically.
        gradient: their gradient, contiguous, in any floating type.
        state: `step` (this one, from 1), and `state1`, `state2`, `absmax1`, `absmax2`, `qmap1`, `qmap2`.
        settings: `lr`, `betas`, `eps` and `weight_decay`.
        seed: an integer (1,) on the device, another one for each step and weight.
        first: a multiple of 256.
    """
    (beta1, beta2), step, lr = settings["betas"][:2], state["step"], settings["lr"]
    correction1, correction2 = 1.0 - beta1**step, (1.0 - beta2**step) ** 0.5
    tensors = [state[name] for name in ("state1", "state2", "absmax1", "absmax2", "qmap1", "qmap2")]
    _adam_8bit[(triton.cdiv(weight.numel(), BLOCK * BLOCKS),)](
        weight, gradient, *tensors, seed,
        beta1, beta2, -lr * correction2 / correction1, settings["eps"] * correction2,
        1.0 - lr * settings["weight_decay"], weight.numel(), first, BLOCK=BLOCK, BLOCKS=BLOCKS, num_warps=2,
    )  # fmt: skip


def random_seed(device: torch.device) -> Tensor:
    """Return a random integer (1,) of the device's generator."""
    return torch.randint(0, torch.iinfo(torch.int32).max, (1,), dtype=torch.int64, device=device)
