"""Packed attention: block-diagonal attention without a dense mask, as one opaque operator."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from lorafit.backbone import unwrapped
from lorafit.engine.attention.grouped import ScoreOptions, grouped_attention, grouped_gradients
from lorafit.engine.attention.sinks import sinks_gradient, with_sinks
from lorafit.engine.packing import Segments, on_host
from lorafit.errors import BackboneError

HALF = (torch.bfloat16, torch.float16)
CUDNN_WIDEST_HEAD = 128
ROUND_WIDTH = 256

ROWS = (
    "Tensor cu_seqlens, Tensor gather, Tensor scatter, Tensor layout, float scale, SymInt? window, float? softcap, "
    "Tensor? sinks=None"
)
# a bare Library: torch.library.custom_op adds 0.25 ms a call on a slow processor, 16 ms a step of 32 layers
LIBRARY = torch.library.Library("lorafit", "FRAGMENT")
LIBRARY.define(
    f"packed_attention(Tensor query, Tensor key, Tensor value, {ROWS}) -> (Tensor, Tensor)",
    tags=[torch.Tag.pt2_compliant_tag],
)
LIBRARY.define(
    f"packed_attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor out, Tensor sums, {ROWS}, "
    "bool trains_sinks=False) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=[torch.Tag.pt2_compliant_tag],
)


def takes_flash(query: Tensor, softcap: float | None) -> bool:
    """Return True if a flash kernel computes the attention.

    Flash kernels keep (heads, tokens) log-sums for the backward.
    """
    return query.device.type == "cuda" and query.dtype in HALF and softcap is None


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    gather: Tensor,
    scatter: Tensor,
    layout: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute causal attention within each row.

    query (1, heads, tokens, dim); key, value (1, kv heads, tokens, dim); sinks (heads,); the rest as in `Segments`.
    Returns (1, tokens, heads, dim) and log-sums (heads, tokens), or (0, 0) without a flash kernel.
    """
    layout = on_host(layout)
    if not takes_flash(query, softcap):
        assert int(layout[-1]), "rows in a CUDA graph have no groups, as their lengths change"
        options = ScoreOptions(scale, window, softcap, sinks)
        mixed = grouped_attention(query, key, value, gather, scatter, layout, options)
        return mixed.contiguous(), query.new_empty((0, 0), dtype=torch.float32)
    if _is_even(query, layout, window):
        out, sums = _even_forward(query, key, value, layout, scale)
    else:
        out, sums = _uneven_forward(query, key, value, cu_seqlens, int(layout[1]), scale, window)
    if sinks is not None:
        out, sums = with_sinks(out, sums, sinks, _rows_of_sums(query, layout, window))
    return out.contiguous(), sums  # kernels use the queries' layout, which is nearly always token by token


def _forward_shapes(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    gather: Tensor,
    scatter: Tensor,
    layout: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    _, heads, tokens, dim = query.shape
    sums = (heads, tokens) if takes_flash(query, softcap) else (0, 0)
    return query.new_empty((1, tokens, heads, dim)), query.new_empty(sums, dtype=torch.float32)


def _backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    sums: Tensor,
    cu_seqlens: Tensor,
    gather: Tensor,
    scatter: Tensor,
    layout: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None = None,
    trains_sinks: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value, in their shapes, laid out token by token, and of trained sinks."""
    layout = on_host(layout)
    if not takes_flash(query, softcap):
        options = ScoreOptions(scale, window, softcap, sinks)
        *grads, of_sinks = grouped_gradients(grad, query, key, value, gather, scatter, layout, options)
        return grads[0], grads[1], grads[2], of_sinks if trains_sinks else query.new_empty(0)
    if _is_even(query, layout, window):
        found = _even_backward(grad, query, key, value, out, sums, layout, scale)
    else:
        found = _uneven_backward(grad, query, key, value, out, sums, cu_seqlens, int(layout[1]), scale, window)
    if sinks is None or not trains_sinks:
        return *found, query.new_empty(0)
    return *found, sinks_gradient(grad, out, sums, sinks, _rows_of_sums(query, layout, window))


def _backward_shapes(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    sums: Tensor,
    cu_seqlens: Tensor,
    gather: Tensor,
    scatter: Tensor,
    layout: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None = None,
    trains_sinks: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grads = [_token_major(tensor.new_empty(tensor.shape)) for tensor in (query, key, value)]
    of_sinks = query.new_empty(0) if sinks is None or not trains_sinks else torch.empty_like(sinks)
    return grads[0], grads[1], grads[2], of_sinks


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, *rows, scale, window, softcap, sinks = inputs
    ctx.save_for_backward(query, key, value, *output, *rows, sinks)
    ctx.how = (scale, window, softcap)


def _gradient(ctx: Any, grad: Tensor, grad_sums: Tensor) -> tuple[Tensor | None, ...]:
    *saved, sinks = ctx.saved_tensors
    trains_sinks = ctx.needs_input_grad[-1]
    *grads, of_sinks = packed_attention_backward(grad.contiguous(), *saved, *ctx.how, sinks, trains_sinks)
    return (*grads, *(None,) * 7, of_sinks if trains_sinks else None)


LIBRARY.impl("packed_attention", _forward, "CompositeExplicitAutograd")
LIBRARY.impl("packed_attention_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("lorafit::packed_attention", _forward_shapes, lib=LIBRARY)
torch.library.register_fake("lorafit::packed_attention_backward", _backward_shapes, lib=LIBRARY)
torch.library.register_autograd("lorafit::packed_attention", _gradient, setup_context=_remember, lib=LIBRARY)

packed_attention_op = torch.ops.lorafit.packed_attention.default
packed_attention_backward = torch.ops.lorafit.packed_attention_backward.default


def _token_major(tensor: Tensor) -> Tensor:
    """Return (1, heads, tokens, dim) with a token's heads side by side, as projections write them."""
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


def _is_even(query: Tensor, layout: Tensor, window: int | None) -> bool:
    """Return True if all rows have one length, so that cuDNN computes them as one batch.

    Only the rows decide, so that equal steps run alike. cuDNN builds a plan for each shape (0.15 s, once). Rows of
    different lengths rarely repeat a shape, and a lone row repeats one only if its length is round.
    """
    rows, width = layout[:2].tolist()
    even = len(layout) == 2 and rows * width == query.shape[2] and (rows > 1 or width % ROUND_WIDTH == 0)
    return even and window is None and query.shape[-1] <= CUDNN_WIDEST_HEAD and _is_hopper(query.device)


def _rows_of_sums(query: Tensor, layout: Tensor, window: int | None) -> int:
    """Return the rows whose heads' log-sums follow one another: cuDNN's, or all tokens as one."""
    return int(layout[0]) if _is_even(query, layout, window) else 1


@cache
def _is_hopper(device: torch.device) -> bool:
    """Return True on GPUs where cuDNN was measured to be faster."""
    return torch.cuda.get_device_capability(device)[0] >= 9


def _rows(tensor: Tensor, layout: Tensor) -> Tensor:
    """Reshape (1, heads, tokens, dim) to (rows, heads, width, dim).

    Nothing is copied if tokens lie one after another.
    """
    return tensor[0].transpose(0, 1).unflatten(0, layout.tolist()).transpose(1, 2)


def _even_forward(query: Tensor, key: Tensor, value: Tensor, layout: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    q, k, v = (_rows(tensor, layout) for tensor in (query, key, value))
    found = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, True, False, scale=scale)
    out = found[0].transpose(1, 2).reshape(1, query.shape[2], query.shape[1], query.shape[3])
    return out, found[1].reshape(query.shape[1], query.shape[2])  # really (rows, heads, width, 1); reshaped back below


def _even_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, sums: Tensor, layout: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, g, o = (_rows(tensor, layout) for tensor in (query, key, value, grad.transpose(1, 2), out.transpose(1, 2)))
    rows, width = layout.tolist()
    sums = sums.reshape(rows, query.shape[1], width, 1)
    unused = torch.empty((), dtype=torch.int64, device=query.device)  # the random state of dropout, which is off
    grads = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        g, q, k, v, o, sums, unused, unused, None, None, None, width, width, 0.0, True, scale=scale
    )
    return tuple(_unflat(piece.transpose(1, 2).flatten(0, 1), query.shape[2]) for piece in grads)  # type: ignore[return-value]


def _uneven_forward(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, longest: int, scale: float, window: int | None
) -> tuple[Tensor, Tensor]:
    q, k, v = (_flat(tensor) for tensor in (query, key, value))
    left = window - 1 if window else -1
    out, sums, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, cu_seqlens, cu_seqlens, longest, longest, 0.0, True, False,
        scale=scale, window_size_left=left, window_size_right=0,
    )  # fmt: skip
    return out.unsqueeze(0), sums


def _uneven_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    sums: Tensor,
    cu_seqlens: Tensor,
    longest: int,
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (_flat(tensor) for tensor in (query, key, value))
    left = window - 1 if window else -1
    unused = torch.empty(2, dtype=torch.uint64, device=query.device)
    grads = torch.ops.aten._flash_attention_backward(
        grad[0], q, k, v, out[0], sums, cu_seqlens, cu_seqlens, longest, longest, 0.0, True, unused, unused,
        scale=scale, window_size_left=left, window_size_right=0,
    )  # fmt: skip
    return tuple(_unflat(piece, query.shape[2]) for piece in grads)  # type: ignore[return-value]


def _flat(tensor: Tensor) -> Tensor:
    """Reshape (1, heads, tokens, dim) to (tokens, heads, dim)."""
    return tensor[0].transpose(0, 1)


def _unflat(grad: Tensor, tokens: int) -> Tensor:
    """Reshape (tokens, heads, dim) to (1, heads, tokens, dim), a token's heads side by side."""
    assert grad.shape[0] == tokens, grad.shape
    return grad.contiguous().transpose(0, 1).unsqueeze(0)


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
    s_aux: torch.Tensor | None = None,
    **unused: Any,
) -> tuple[torch.Tensor, None]:
    """Compute causal attention within each segment.

    query (1, heads, tokens, dim); key and value (1, kv heads, tokens, dim); returns (1, tokens, heads, dim).
    `sliding_window` counts the token itself, as in transformers; `softcap` is Gemma 2's tanh cap on scores; `s_aux`
    (heads,) are attention sinks. Raises BackboneError for a family that does not pass its segments on.
    """
    if segments is None or attention_mask is not None:
        raise BackboneError(
            "this family does not pass its arguments on to attention, so its rows cannot be packed",
            where=type(module).__name__,
            fix="choose another base, and report this one",
        )
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    rows, options = (segments.gather, segments.scatter, segments.layout), (scale, sliding_window, softcap, s_aux)
    if takes_flash(query, softcap) or torch.compiler.is_compiling():
        return packed_attention_op(query, key, value, segments.cu_seqlens, *rows, *options)[0], None
    return grouped_attention(query, key, value, *rows, ScoreOptions(*options)), None


AttentionInterface.register(PACKED, packed_attention)


@contextmanager
def packed(model: Any) -> Iterator[None]:
    """Use packed attention in `model` inside the block: for training and its evaluation."""
    before = model.config._attn_implementation
    try:
        use_packed_attention(model)
        yield
    finally:
        _restore(model, before)


@contextmanager
def unpacked(model: Any) -> Iterator[None]:
    """Use transformers' attention in `model` inside the block: for generation.

    It is SDPA, or eager attention for soft-capped families.
    """
    before = model.config._attn_implementation
    use_plain_attention(model)
    try:
        yield
    finally:
        _restore(model, before)


def _restore(model: Any, before: str) -> None:
    if model.config._attn_implementation != before:
        unwrapped(model).set_attn_implementation(before)


def _is_settable(core: Any) -> bool:
    """Return False for a family with its own fixed attention, about which transformers would only warn."""
    return bool(getattr(core, "_can_set_attn_implementation", lambda: True)())


def use_packed_attention(model: Any) -> None:
    """Switch `model` to packed attention.

    Raises BackboneError for a family with its own fixed attention.
    """
    core = unwrapped(model)
    if _is_settable(core):
        core.set_attn_implementation(PACKED)
    if model.config._attn_implementation != PACKED:
        raise BackboneError(
            f"{type(unwrapped(model)).__name__} does not take its attention from transformers' AttentionInterface",
            fix="choose another base: lorafit cannot pack rows for this family",
        )


def use_plain_attention(model: Any) -> None:
    """Switch `model` to SDPA, or to eager attention if the family caps its scores or has sinks.

    SDPA does not support them. A family with its own fixed attention keeps it.
    """
    text, core = model.config.get_text_config(), unwrapped(model)
    eager = getattr(text, "attn_logit_softcapping", None) or not getattr(core, "_supports_sdpa", True)
    if _is_settable(core):
        core.set_attn_implementation("eager" if eager else "sdpa")
