"""Attention sinks: one more column of each head's softmax, whose value is zero (Xiao et al. 2023, gpt-oss).

With the log-sum `lse` of a query's scores, the column adds `exp(sink)` to the denominator. So the output shrinks by
`exp(lse - total)`, where `total = log(exp(lse) + exp(sink))`. A flash kernel's backward computes chances as
`exp(score - lse)`, and subtracts the product of output and gradient: given the shrunk output and `total`, it returns
the gradients of attention with sinks, without another kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor


def with_sinks(out: Tensor, sums: Tensor, sinks: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Return the output and log-sums of a flash kernel as they are with `sinks` (heads,).

    out (1, tokens, heads, dim); `sums` (heads, tokens) in the kernel's own order, see `_by_token`.
    """
    alone = _by_token(sums, rows)
    total = torch.logaddexp(alone, sinks.float())
    shrunk = out * torch.exp(alone - total).unsqueeze(-1)
    return shrunk.to(out.dtype), _in_order(total, rows)


def sinks_gradient(grad: Tensor, out: Tensor, sums: Tensor, sinks: Tensor, rows: int) -> Tensor:
    """Return the gradient (heads,) of the sinks; `out` and `sums` are those of `with_sinks`.

    A sink takes its chance from all others: d out / d sink = -chance * out.
    """
    moved = (grad[0].float() * out[0].float()).sum(-1)
    return -(torch.exp(sinks.float() - _by_token(sums, rows)) * moved).sum(0).to(sinks.dtype)


def _by_token(sums: Tensor, rows: int) -> Tensor:
    """Return log-sums (tokens, heads), of which the kernel wrote all heads of one of `rows` after another."""
    heads = sums.shape[0]
    return sums.reshape(rows, heads, -1).transpose(1, 2).flatten(0, 1)


def _in_order(sums: Tensor, rows: int) -> Tensor:
    """Return log-sums (tokens, heads) in the order of `_by_token`'s argument."""
    tokens, heads = sums.shape
    return sums.unflatten(0, (rows, tokens // rows)).transpose(1, 2).reshape(heads, tokens)
