"""thaw: 4-bit linears back into plain ones, the inverse of freezing (up to the rounding to 4 bits)."""

from __future__ import annotations

from typing import Any

from torch import nn

from lorafit.backbone.bits import Linear4bit
from lorafit.backbone.packed_weight import dequantise


def thaw_linear(linear: nn.Module) -> nn.Linear:
    """A plain linear with the dequantised weight (out, in) in the layer's compute dtype; `linear` if it is plain."""
    if not isinstance(linear, Linear4bit):
        assert isinstance(linear, nn.Linear), type(linear)
        return linear
    weight = dequantise(linear, linear.compute_dtype)
    plain = nn.Linear(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
    plain.weight = nn.Parameter(weight, requires_grad=False)
    if linear.bias is not None:
        plain.bias = nn.Parameter(linear.bias.detach().to(weight.dtype), requires_grad=False)
    return plain.train(linear.training)


def thaw_linears(model: nn.Module) -> nn.Module:
    """Replace every 4-bit linear of `model`, in place, and return `model`."""
    for path, module in list(model.named_modules()):
        if isinstance(module, Linear4bit):
            parent, _, leaf = path.rpartition(".")
            setattr(model.get_submodule(parent), leaf, thaw_linear(module))
    return model


def forget_quantisation(model: Any) -> Any:
    """Take off `model` what transformers put there for a 4-bit base, so that it saves and moves as a plain one."""
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.is_loaded_in_4bit = model.is_quantized = False
    for name in ("hf_quantizer", "quantization_method"):
        if hasattr(model, name):
            delattr(model, name)
    return model
