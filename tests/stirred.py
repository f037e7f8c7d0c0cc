"""Adapters moved away from their start, and bases in plain linears to compare them with."""

import torch

from lorafit.backbone import dequantize_linears, forget_quantization, load_backbone
from lorafit.methods import METHODS


def stirred(model):
    """Move every trained weight away from its start, magnitudes (of one axis) too."""
    generator = torch.Generator().manual_seed(1)
    for weight in METHODS["lora"].trainable(model):
        noise = torch.randn(weight.shape, generator=generator)
        weight.data.add_(noise * 0.05 if weight.ndim > 1 else noise * 0.1 * weight.data)
    return model


def plain_model(config):
    """The base with the weights that `config` multiplies by, in plain linears."""
    model = load_backbone(config)
    return forget_quantization(dequantize_linears(model)) if config.quantization == "nf4" else model
