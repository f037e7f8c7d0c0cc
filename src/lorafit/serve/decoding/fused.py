"""fused: one kernel where a family's own code starts many; on a GPU a decoding step is hundreds of tiny ones."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

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
