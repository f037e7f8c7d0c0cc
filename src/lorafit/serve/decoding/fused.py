"""fused: one kernel where a family's own code starts many; on a GPU a decoding step is hundreds of tiny ones."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lorafit.backbone import decoder_layers
from lorafit.serve.decoding.slot_cache import StoreKernel

if importlib.util.find_spec("triton") is not None:
    from lorafit.serve.decoding import decode_kernels
else:
    decode_kernels = None  # type: ignore[assignment]

ROTATION = "apply_rotary_pos_emb"
"""Name of the function that rotates queries and keys in the code of transformers' families."""
SLOTS = "lorafit_slots"
"""Name of the attention below in transformers' registry."""
ROUNDINGS = 4
"""Most roundings of the dtype by which a fused norm may differ from the family's own."""


def slot_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Return SDPA's attention (rows, tokens, heads, dim); keys are not copied for the queries that share them.

    One token of `heads` queries over fewer key heads is as many tokens over as many heads: all see the same keys.
    """
    rows, heads, tokens, dim = query.shape
    shared = heads // key.shape[1]
    if tokens > 1 or shared == 1 or attention_mask is None or attention_mask.shape[1] > 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    folded = query.reshape(rows, key.shape[1], shared, dim)
    scale = options.get("scaling")
    mask = attention_mask.expand(-1, -1, shared, -1)
    out = F.scaled_dot_product_attention(folded, key, value, attn_mask=mask, scale=scale)
    return out.reshape(rows, 1, heads, value.shape[-1]), None


AttentionInterface.register(SLOTS, slot_attention)
AttentionMaskInterface.register(SLOTS, sdpa_mask)


def use_slot_attention(model: Any) -> None:
    """Switch `model` from SDPA to `slot_attention`; a family that takes no attention from outside stays as it is."""
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(SLOTS)
        if model.config._attn_implementation != SLOTS:
            model.set_attn_implementation("sdpa")


@torch.inference_mode()
def fuse_norms(model: nn.Module) -> int:
    """Let torch's own kernel compute every RMS norm of `model` that it computes alike. Returns their number.

    A norm is known by what it computes on random numbers, and not by its class: Gemma's adds one to its weight.
    """
    fused = 0
    for module in model.modules():
        if "RMSNorm" not in type(module).__name__ or len(list(module.parameters())) != 1:
            continue
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        weight = getattr(module, "weight", None)
        if weight is not None and eps is not None and _is_plain(module, weight, float(eps)):
            module.forward = _fused(weight, float(eps))
            fused += 1
    return fused


def _fused(weight: Tensor, eps: float) -> Any:
    def forward(hidden: Tensor) -> Tensor:
        return F.rms_norm(hidden, weight.shape, weight, eps)

    return forward


def _is_plain(module: nn.Module, weight: Tensor, eps: float) -> bool:
    generator = torch.Generator().manual_seed(0)
    shape = (4, 1, weight.shape[0])
    hidden = torch.randn(shape, generator=generator).to(weight)
    found, wanted = F.rms_norm(hidden, weight.shape, weight, eps), module(hidden)
    bound = ROUNDINGS * torch.finfo(weight.dtype).eps
    return wanted.shape == found.shape and torch.allclose(found, wanted, rtol=bound, atol=bound)


@contextmanager
def one_rotation(modules: list[ModuleType]) -> Iterator[None]:
    """Let one kernel rotate the queries and keys of one-token rows within the block, in the code of `modules`."""
    before = [(module, getattr(module, ROTATION)) for module in modules]
    try:
        for module, rotation in before:
            setattr(module, ROTATION, _rotating(rotation))
        yield
    finally:
        for module, rotation in before:
            setattr(module, ROTATION, rotation)


def rotating_modules(model: nn.Module) -> list[ModuleType]:
    """Return the modules of `model`'s code whose rotation the kernel computes, to the bit. None without a kernel."""
    weight: Tensor = model.get_input_embeddings().weight  # type: ignore[operator]
    if not kernels_work(weight.device):
        return []
    modules = {sys.modules[type(part).__module__] for layer in decoder_layers(model) for part in layer.modules()}
    return [module for module in modules if hasattr(module, ROTATION) and _is_kernels(module, weight)]


def store_kernel(device: torch.device) -> StoreKernel | None:
    """Return the kernel that writes keys and values at once, or None where it cannot be built."""
    return decode_kernels.store if kernels_work(device) else None


def _rotating(plain: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *more: Any, **options: Any) -> tuple[Tensor, Tensor]:
        each = (q, k, cos, sin)
        fits = q.ndim == k.ndim == 4 and q.shape[2] == 1 and cos.shape == sin.shape == (len(q), 1, q.shape[-1])
        alike = all(tensor.is_contiguous() and tensor.dtype is q.dtype for tensor in each)
        if more or options or not fits or not alike or k.shape[-1] != q.shape[-1]:
            return plain(*each, *more, **options)
        return decode_kernels.rotate(*each)

    return rotate


def _is_kernels(module: ModuleType, like: Tensor) -> bool:
    """Return True if the family's function gives the kernel's bits on random numbers."""
    q, k, cos, sin = _random_rows(like)
    try:
        found = getattr(module, ROTATION)(q, k, cos, sin)
    except (TypeError, ValueError, RuntimeError):
        return False  # it takes other arguments
    return all(map(torch.equal, found, decode_kernels.rotate(q, k, cos, sin)))


@cache
def kernels_work(device: torch.device) -> bool:
    """Return True if Triton builds the kernels for `device`, and they write the right values."""
    if decode_kernels is None or device.type != "cuda" or torch.version.cuda is None:
        return False
    q, k, cos, _ = _random_rows(torch.empty(0, device=device))
    kept = [torch.zeros(*k.shape[:2], 5, k.shape[-1], device=device) for _ in range(2)]
    writes = torch.arange(len(k), device=device)
    try:
        decode_kernels.rotate(q, k, cos, cos)
        decode_kernels.store(kept[0], kept[1], k, k + 1, writes)
    except (RuntimeError, TypeError, OSError, subprocess.CalledProcessError):
        return False  # Triton builds its launchers with a C compiler, which not every machine has
    rows = torch.arange(len(k), device=device)
    return all(
        torch.equal(tensor[rows, :, writes], written[:, :, 0]) for tensor, written in zip(kept, (k, k + 1), strict=True)
    )


def _random_rows(like: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return queries (3, 4, 1, 24), keys (3, 2, 1, 24), and two sets of angles' cosines (3, 1, 24)."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((3, 4, 1, 24), (3, 2, 1, 24), (3, 1, 24), (3, 1, 24))
    q, k, cos, sin = (torch.randn(shape, generator=generator).to(like) for shape in shapes)
    return q, k, cos, sin
