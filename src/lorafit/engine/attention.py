"""Attention for packed rows: block-diagonal without a dense mask, through transformers' AttentionInterface.

A row sees itself and nothing of its neighbours because attention runs row by row (in groups of similar length),
not because a mask hides them. Registered under a name that has no mask function, so transformers builds no mask.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from lorafit.engine.segments import Group, Segments
from lorafit.errors import BackboneError

PACKED = "lorafit_packed"
VARLEN_DTYPES = (torch.bfloat16, torch.float16)

varlen_attn: Any
try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # torch builds without it still have the grouped path
    varlen_attn = None
# the flag came after torch 2.11
VARLEN_SHARES_KEYS = varlen_attn is not None and "enable_gqa" in signature(varlen_attn).parameters


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    segments: Segments | None = None,
    **unused: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each segment.

    query (1, heads, tokens, dim); key and value (1, kv heads, tokens, dim); returns (1, tokens, heads, dim).
    `sliding_window` counts the token itself, as in transformers; `softcap` is Gemma 2's tanh cap on scores.
    """
    if segments is None or attention_mask is not None:
        raise BackboneError(
            "this family does not hand its arguments down to attention, so its rows cannot be packed",
            where=type(module).__name__,
            fix="choose another base, and report this one",
        )
    if unused.get("s_aux") is not None:
        raise BackboneError("attention sinks are not supported for packed rows", where=type(module).__name__)
    window = sliding_window if sliding_window and sliding_window < segments.longest else None
    if varlen_attn is not None and query.is_cuda and query.dtype in VARLEN_DTYPES and softcap is None:
        return _varlen(query, key, value, scaling, window, segments), None
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    parts = [_grouped(query, key, value, scale, window, softcap, group) for group in segments.groups]
    flat = parts[0] if len(parts) == 1 else torch.cat(parts)
    return flat.index_select(0, segments.scatter).unsqueeze(0), None


def _varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
    window: int | None,
    segments: Segments,
) -> torch.Tensor:
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))  # (tokens, heads, dim)
    options: dict[str, Any] = {"scale": scaling, "window_size": (window - 1 if window else -1, 0)}
    if q.shape[1] != k.shape[1]:
        if VARLEN_SHARES_KEYS:
            options["enable_gqa"] = True
        else:
            k, v = (tensor.repeat_interleave(q.shape[1] // k.shape[1], 1) for tensor in (k, v))
    edges, longest = segments.boundaries, segments.longest
    return varlen_attn(q, k, v, edges, edges, longest, longest, **options).unsqueeze(0)


def _grouped(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    group: Group,
) -> torch.Tensor:
    """Attention of one group of rows; returns (rows * longest, heads, dim)."""
    q, k, v = (_gathered(tensor, group) for tensor in (query, key, value))
    shares_keys = q.shape[1] != k.shape[1]
    if softcap is not None:
        mixed = _capped(q, k, v, scale, window, softcap)
    elif window is None:
        mixed = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=shares_keys)
    else:
        band = _band(q.shape[2], window, q.device)
        mixed = scaled_dot_product_attention(q, k, v, attn_mask=band, scale=scale, enable_gqa=shares_keys)
    return mixed.transpose(1, 2).flatten(0, 1)


def _gathered(tensor: torch.Tensor, group: Group) -> torch.Tensor:
    """(1, heads, tokens, dim) → (rows, heads, longest, dim)."""
    rows, longest = group.tokens.shape
    tokens_first = tensor[0].transpose(0, 1).index_select(0, group.tokens.flatten())
    return tokens_first.view(rows, longest, *tokens_first.shape[1:]).transpose(1, 2)


def _band(length: int, window: int | None, device: torch.device) -> torch.Tensor:
    """(length, length) bool: True where a query may see a key; causal, at most `window` tokens back."""
    distance = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)[None, :]
    return (distance >= 0) & (distance < (window or length))


def _capped(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, window: int | None, softcap: float
) -> torch.Tensor:
    """softmax(cap · tanh(scores / cap)) · value, as transformers' eager Gemma 2 does it, softmax in fp32."""
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scores = torch.tanh(query @ key.transpose(-1, -2) * scale / softcap) * softcap
    scores = scores.masked_fill(~_band(query.shape[2], window, query.device), float("-inf"))
    return torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype) @ value


AttentionInterface.register(PACKED, packed_attention)


@contextmanager
def packed(model: Any) -> Iterator[None]:
    """Within it `model` attends within segments: for training and its evaluation."""
    before = model.config._attn_implementation
    use_packed_attention(model)
    try:
        yield
    finally:
        _core(model).set_attn_implementation(before)


@contextmanager
def unpacked(model: Any) -> Iterator[None]:
    """Within it `model` attends as transformers' SDPA (or eager, for soft-capped families) does: for generation."""
    before = model.config._attn_implementation
    use_plain_attention(model)
    try:
        yield
    finally:
        _core(model).set_attn_implementation(before)


def use_packed_attention(model: Any) -> None:
    """Switch `model` to packed attention. Raises BackboneError for a family that has its own fixed attention."""
    _core(model).set_attn_implementation(PACKED)
    if model.config._attn_implementation != PACKED:
        raise BackboneError(
            f"{type(_core(model)).__name__} does not take its attention from transformers' AttentionInterface",
            fix="lorafit cannot pack rows for this family",
        )


def use_plain_attention(model: Any) -> None:
    """Switch `model` to SDPA, or to eager attention where the family caps its scores, which SDPA cannot."""
    text = model.config.get_text_config()
    plain = "eager" if getattr(text, "attn_logit_softcapping", None) else "sdpa"
    _core(model).set_attn_implementation(plain)


def _core(model: Any) -> Any:
    """The transformers model under a PEFT wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
