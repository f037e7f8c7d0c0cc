"""Grouped attention: attention over groups of rows of similar length.

It supports any device, any precision, capped scores, windows and sinks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention

from lorafit.engine.packing import Group, groups_of
from lorafit.memory.footprint import SCORES


class ScoreOptions(NamedTuple):
    """Hold the options of attention scores.

    Attributes:
        scale: factor of the products of queries and keys.
        window: most tokens back that a query sees, itself included; None for all.
        softcap: tanh cap on scores; None without.
        sinks: (heads,) scores of one more column with the value zero; None without.
    """

    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None


def grouped_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    gather: torch.Tensor,
    scatter: torch.Tensor,
    layout: torch.Tensor,
    options: ScoreOptions,
) -> torch.Tensor:
    """Compute causal attention within each row.

    Shapes are those of `packed_attention`; returns (1, tokens, heads, dim).
    """
    groups = groups_of(gather, layout)
    parts = [_group_attention(query, key, value, options, group) for group in groups]
    flat = parts[0] if len(parts) == 1 else torch.cat(parts)
    return flat.index_select(0, scatter).unsqueeze(0)


def _group_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    options: ScoreOptions,
    group: Group,
) -> torch.Tensor:
    """Compute the attention of one group of rows; returns (rows * longest, heads, dim)."""
    q, k, v = (_gathered(tensor, group) for tensor in (query, key, value))
    shares_keys = q.shape[1] != k.shape[1]
    window = options.window
    if options.softcap is not None or options.sinks is not None:
        mixed = _written_out(q, k, v, options)
    elif window is None or window >= q.shape[2]:
        mixed = scaled_dot_product_attention(q, k, v, is_causal=True, scale=options.scale, enable_gqa=shares_keys)
    else:
        band = _band(q.shape[2], window, q.device)
        mixed = scaled_dot_product_attention(q, k, v, attn_mask=band, scale=options.scale, enable_gqa=shares_keys)
    return mixed.transpose(1, 2).flatten(0, 1)


def _gathered(tensor: torch.Tensor, group: Group) -> torch.Tensor:
    """Gather (1, heads, tokens, dim) into (rows, heads, longest, dim)."""
    rows, longest = group.tokens.shape
    tokens_first = tensor[0].transpose(0, 1).index_select(0, group.tokens.flatten())
    return tokens_first.view(rows, longest, *tokens_first.shape[1:]).transpose(1, 2)


def _band(length: int, window: int | None, device: torch.device) -> torch.Tensor:
    """Return (length, length) bool, True if a query may see a key.

    A query sees at most `window` tokens back, itself included, and no later one.
    """
    distance = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)[None, :]
    return (distance >= 0) & (distance < (window or length))


def _written_out(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, options: ScoreOptions) -> torch.Tensor:
    """Compute softmax(cap · tanh(scores / cap)) · value, with a column for each head's sink.

    It follows transformers' eager Gemma 2 and gpt-oss, with the softmax in fp32.
    """
    repeats, softcap, sinks = query.shape[1] // key.shape[1], options.softcap, options.sinks
    hidden = ~_band(query.shape[2], options.window, query.device)
    rows: dict[int, list[torch.Tensor]] = {}
    for row, head, heads in _pieces(key, repeats):
        q, k, v = query[row, heads], key[row, head], value[row, head]
        k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
        scores = q @ k.transpose(-1, -2) * options.scale
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        chances = _softmax(scores.masked_fill(hidden, float("-inf")), None if sinks is None else sinks[heads])
        mixed = chances.to(q.dtype) @ v
        rows.setdefault(row.start, []).append(mixed)
    return torch.cat([torch.cat(parts, 1) for parts in rows.values()])


def _softmax(scores: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
    """Return the softmax of scores (rows, heads, queries, keys) in fp32, or wider, with a column for each sink."""
    if sinks is None:
        return torch.softmax(scores, dim=-1, dtype=torch.float32)
    columns = sinks.to(scores.dtype).view(-1, 1, 1).expand(*scores.shape[:3], 1)
    return torch.softmax(torch.cat([scores, columns], -1), dim=-1, dtype=torch.float32)[..., :-1]


def _pieces(key: torch.Tensor, repeats: int) -> Iterator[tuple[slice, slice, slice]]:
    """Yield slices of rows, key heads, and the query heads that share them.

    `key` is (rows, kv heads, longest, dim). Each piece has at most SCORES scores, but at least one key head of one row.
    """
    rows, kv_heads, longest, _ = key.shape
    each = max(1, repeats * longest * longest)
    heads = max(1, min(kv_heads, SCORES // each))
    at_once = max(1, SCORES // (each * kv_heads))
    for row in range(0, rows, at_once):
        for head in range(0, kv_heads, heads):
            end = min(head + heads, kv_heads)
            yield slice(row, row + at_once), slice(head, end), slice(head * repeats, end * repeats)


def grouped_gradients(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    gather: torch.Tensor,
    scatter: torch.Tensor,
    layout: torch.Tensor,
    options: ScoreOptions,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of `grouped_attention` in the shapes of query, key, value and sinks; (0,) without sinks.

    `grad` is (1, tokens, heads, dim). The gradients are written out, since an opaque operator has no autograd inside.
    Scores grow with the square of a row, so they are recomputed here and never kept. Padded queries have no gradient,
    and no real query sees a padded key.
    """
    parts: tuple[list[torch.Tensor], ...] = ([], [], [])
    sinks = options.sinks
    of_sinks = torch.zeros(0 if sinks is None else len(sinks), device=query.device)
    padded = torch.zeros((gather.shape[0], *grad.shape[2:]), dtype=grad.dtype, device=grad.device)
    padded.index_copy_(0, scatter, grad[0])
    start = 0
    for group in groups_of(gather, layout):
        rows, width = group.tokens.shape
        g = padded[start : start + rows * width].view(rows, width, *grad.shape[2:]).transpose(1, 2)
        found = _group_gradients(g, query, key, value, options, of_sinks, group)
        for part, piece in zip(parts, found, strict=True):
            part.append(piece.transpose(1, 2).flatten(0, 1))
        start += rows * width
    grads = (torch.cat(part).index_select(0, scatter).transpose(0, 1)[None] for part in parts)
    return (*grads, of_sinks if sinks is None else of_sinks.to(sinks.dtype))  # type: ignore[return-value]


def _group_gradients(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    options: ScoreOptions,
    of_sinks: torch.Tensor,
    group: Group,
) -> list[torch.Tensor]:
    """Return the gradients (rows, heads, longest, dim) of one group, and add that of the sinks to `of_sinks`.

    `grad` of the group's output has the same shape.
    """
    q, k, v = (_gathered(tensor, group) for tensor in (query, key, value))
    repeats, sinks = q.shape[1] // k.shape[1], options.sinks
    hidden = ~_band(q.shape[2], options.window, q.device)
    grads = [torch.empty_like(tensor) for tensor in (q, k, v)]
    for row, head, heads in _pieces(k, repeats):
        own = options._replace(sinks=None if sinks is None else sinks[heads])
        these = (grad[row, heads], q[row, heads], k[row, head], v[row, head])
        *piece, of_own = _piece_gradients(*these, hidden, own)
        if sinks is not None:
            of_sinks[heads] += of_own
        for whole, part, places in zip(grads, piece, (heads, head, head), strict=True):
            whole[row, places] = part
    return grads


def _piece_gradients(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    hidden: torch.Tensor,
    options: ScoreOptions,
) -> list[torch.Tensor]:
    """Return the gradients of these queries, keys, values and sinks.

    `hidden` is True where a query may not see a key.
    """
    kv_heads, repeats, scale, softcap = k.shape[1], q.shape[1] // k.shape[1], options.scale, options.softcap
    k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    scores = (q @ k.transpose(-1, -2)).float() * scale
    capped = torch.tanh(scores / softcap) if softcap is not None else None
    seen = scores if softcap is None or capped is None else capped * softcap
    chances = _softmax(seen.masked_fill(hidden, float("-inf")), options.sinks)
    of_chances = (grad @ v.transpose(-1, -2)).float()
    mean = (of_chances * chances).sum(-1, keepdim=True)
    of_scores = chances * (of_chances - mean)
    # the column of the sinks has the rest of the chances, and a value of zero
    of_sinks = -((1 - chances.sum(-1, keepdim=True)) * mean).sum((0, 2, 3))
    if capped is not None:
        of_scores = of_scores * (1 - capped * capped)
    of_scores = (of_scores * scale).to(q.dtype)
    of_key, of_value = of_scores.transpose(-1, -2) @ q, chances.to(q.dtype).transpose(-1, -2) @ grad
    summed = [piece.unflatten(1, (kv_heads, repeats)).sum(2) for piece in (of_key, of_value)]
    return [of_scores @ k, *summed, of_sinks]
