"""Layout: the modules that hold all experts of a layer in 3-D parameters."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from lorafit.backbone.architecture import kept_in_fp32, text_decoder
from lorafit.shapes.shape import MOST_PACKED


def expert_names(module: nn.Module) -> tuple[str, ...]:
    """Return the names of the 3-D parameters of `module`; none unless it takes transformers' experts interface.

    The interface (`transformers.integrations.moe.use_experts_implementation`) says how each layout is multiplied:
    weights (experts, out, in), or (experts, in, out) when `is_transposed`, with a fused gate or without one.
    """
    if not all(hasattr(module, mark) for mark in ("_apply_gate", "has_gate", "has_bias", "is_transposed")):
        return ()
    return ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")


def experts_to_quantize(model: nn.Module) -> list[str]:
    """Return the dotted names of the parameters of experts of the text decoder that lorafit quantizes."""
    kept = set(kept_in_fp32(model))
    return [name for name in _stacked(model) if not kept.intersection(name.split("."))]


def _stacked(model: nn.Module) -> Iterator[str]:
    inside = set(text_decoder(model).modules())
    for path, module in model.named_modules():
        names = expert_names(module) if module in inside else ()
        if names and all(map(_packs, (module._parameters.get(name) for name in names))):
            yield from (f"{path}.{name}" for name in names)


def _packs(weight: nn.Parameter | None) -> bool:
    return weight is not None and weight.dim() == 3 and weight.numel() < MOST_PACKED


def transposed_experts(model: nn.Module) -> set[str]:
    """Return the dotted names of the stacked parameters of `model` whose matrices are stored as (in, out)."""
    return {name for name in experts_to_quantize(model) if model.get_submodule(name.rpartition(".")[0]).is_transposed}
