"""experts: stacked experts in 4 bits, quantized while they are loaded and multiplied in groups."""

from lorafit.backbone.experts.frozen_experts import (
    SUFFIX,
    FrozenExpertsLinear,
    experts_to_quantize,
    freeze_experts,
    frozen_in,
    frozen_weights,
    quantize_experts,
    stacked_experts,
    transposed_experts,
    unfreeze_experts,
)
from lorafit.backbone.experts.quantizer import quantizing_experts, restore_method

__all__ = [
    "SUFFIX",
    "FrozenExpertsLinear",
    "experts_to_quantize",
    "freeze_experts",
    "frozen_in",
    "frozen_weights",
    "quantize_experts",
    "quantizing_experts",
    "restore_method",
    "stacked_experts",
    "transposed_experts",
    "unfreeze_experts",
]
