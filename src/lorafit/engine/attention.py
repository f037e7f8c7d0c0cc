"""Attention for packed rows: block-diagonal without a dense mask, through transformers' AttentionInterface.

A row sees itself and nothing of its neighbours because attention runs row by row (in groups of similar length),
not because a mask hides them. Registered under a name that has no mask function, so transformers builds no mask.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AttentionInterface

from lorafit.engine.attention_op import packed_attention_op, takes_flash
from lorafit.engine.grouped_attention import grouped_attention
from lorafit.engine.segments import Segments
from lorafit.errors import BackboneError

PACKED = "lorafit_packed"


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
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    rows = (segments.gather, segments.scatter, segments.layout)
    if takes_flash(query, softcap) or torch.compiler.is_compiling():
        options = (scale, sliding_window, softcap)
        return packed_attention_op(query, key, value, segments.boundaries, *rows, *options)[0], None
    return grouped_attention(query, key, value, *rows, scale, sliding_window, softcap), None


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
