"""factors: the low-rank matrices that PiSSA, OLoRA and LoftQ begin with, as in PEFT.

PiSSA: Meng et al., arXiv:2404.02948. OLoRA: Büyükakyüz, arXiv:2406.01775. LoftQ: Li et al., arXiv:2310.08659.
"""

from __future__ import annotations

import torch
from torch import Tensor

ITERATIONS, OVERSAMPLES = 8, 8
"""Power iterations and additional columns of the randomized SVD (Halko et al., arXiv:0909.4061)."""


def principal(weight: Tensor, rank: int, scale: float, seed: int) -> tuple[Tensor, Tensor]:
    """Return A (r, in) and B (out, r), fp32, with scale · B @ A the closest matrix of `rank` to `weight` (out, in).

    Both have the same norms. PiSSA takes them of the weight, LoftQ of its quantization error.
    """
    columns = min(rank + OVERSAMPLES, *weight.shape)
    devices = [weight.device] if weight.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        left, values, right = torch.svd_lowrank(weight.float(), columns, ITERATIONS)
    roots = (values[:rank] / scale).sqrt()
    return (right[:, :rank] * roots).T.contiguous(), (left[:, :rank] * roots).contiguous()


def orthonormal(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return A (r, in) and B (out, r) of OLoRA: the first columns of Q and rows of R in `weight` (out, in) = Q R.

    Q's first columns come of the weight's first columns alone.
    """
    q, _ = torch.linalg.qr(weight[:, :rank].float())
    return (q.T @ weight.float()).contiguous(), q.contiguous()
