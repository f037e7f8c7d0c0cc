"""in_fp8: the linears of a full run that multiply in FP8. Their weights train in 16 or 32 bits."""

from __future__ import annotations

from torch import nn

from lorafit.backbone import TrainedLinearFp8, linears_to_quantize, takes_fp8
from lorafit.backbone.projections import ROUTERS


def multiply_in_fp8(model: nn.Module) -> list[str]:
    """Let the decoder's linears multiply in FP8, and return their names.

    Head and embeddings are no part of it, nor are stacked experts, routers and widths that are no multiples of 16. All
    layers are: the losses of the demo's base are within their bound (bench/full_fp8.py), and torchao's recipes leave
    out the head alone.
    """
    chosen = [name for name in linears_to_quantize(model) if _takes(name, model.get_submodule(name))]
    for name in chosen:
        model.get_submodule(name).__class__ = TrainedLinearFp8
    return chosen


def _takes(name: str, linear: nn.Module) -> bool:
    # rounding in a router would send tokens to other experts
    return name.rpartition(".")[2] not in ROUTERS and isinstance(linear, nn.Linear) and takes_fp8(linear)
