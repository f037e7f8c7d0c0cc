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


def assert_learns_alike(ours, theirs, ids, own_name):
    """Hold that two models have the same loss and gradients, with the weights of `ours` given to `theirs`.

    `own_name` turns the name of a trained weight of `theirs` into that of `ours`.
    """
    names, pairs = dict(ours.named_parameters()), {}
    for name, weight in theirs.named_parameters():
        if weight.requires_grad:
            own = own_name(name)
            weight.data.copy_(names[own].data)
            pairs[own] = weight
    losses = [model(input_ids=ids, labels=ids).loss for model in (ours, theirs)]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)
    for loss in losses:
        loss.backward()
    assert set(pairs) == {name for name, weight in names.items() if weight.requires_grad}
    for name, weight in pairs.items():
        torch.testing.assert_close(names[name].grad, weight.grad, rtol=1e-3, atol=1e-5, msg=name)
