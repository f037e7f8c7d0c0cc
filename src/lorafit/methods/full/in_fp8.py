"""in_fp8: the linears of a full run that multiply in FP8. Their weights train in 16 or 32 bits."""

from __future__ import annotations

from torch import nn

from lorafit.backbone import TrainedLinearFp8, decoder_layers, linears_to_quantize, takes_fp8

WHOLE_LAYERS = 0
"""Decoder layers at either end whose products stay in 16 bits. None: the losses of the demo's base are
within their bound without (bench/full_fp8.py), and torchao's recipes leave out the head alone."""
ROUTERS = frozenset({"gate", "router", "shared_expert_gate"})
"""Linears that choose experts. Rounding would send tokens to others."""


def multiply_in_fp8(model: nn.Module) -> list[str]:
    """Let the decoder's linears multiply in FP8, and return their names.

    Head and embeddings are no part of it, nor are stacked experts, routers and widths that are no multiples of 16.
    """
    layers = decoder_layers(model)
    ends = {part for one in (*layers[:WHOLE_LAYERS], *layers[len(layers) - WHOLE_LAYERS :]) for part in one.modules()}
    linears = {name: model.get_submodule(name) for name in linears_to_quantize(model)}
    chosen = [name for name, linear in linears.items() if linear not in ends and _takes(name, linear)]
    for name in chosen:
        model.get_submodule(name).__class__ = TrainedLinearFp8
    return chosen


def _takes(name: str, linear: nn.Module) -> bool:
    return name.rpartition(".")[2] not in ROUTERS and isinstance(linear, nn.Linear) and takes_fp8(linear)
