"""Weights into 4 bits and back, and 4-bit linears back into plain ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lorafit.backbone.bitsandbytes_import import Linear4bit, Params4bit
from lorafit.backbone.kernels.frozen_linear import FrozenLinear4bit, freeze_linears
from lorafit.backbone.kernels.frozen_linear_op import unpack

QUANT_TYPE = "nf4"
BLOCK = 64


def quantise(
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    compute_dtype: torch.dtype | None = None,
    block: int = BLOCK,
    double: bool = True,
    dense_budget_bytes: int | None = 0,
) -> FrozenLinear4bit:
    """The NF4 linear of `weight` (out, in), quantised on its device; `double` quantises the scales too.

    Computes in `compute_dtype`, by default the weight's own. The same numbers as bitsandbytes' own loading.
    """
    rows, columns = weight.shape
    dtype = compute_dtype or weight.dtype
    linear = Linear4bit(columns, rows, bias is not None, dtype, double, QUANT_TYPE, device="meta")
    linear.weight = Params4bit(
        weight.detach(), blocksize=block, compress_statistics=double, quant_type=QUANT_TYPE, module=linear
    ).to(weight.device)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    freeze_linears(linear, dtype, dense_budget_bytes)
    assert isinstance(linear, FrozenLinear4bit)
    return linear


def dequantise(linear: Linear4bit, dtype: torch.dtype | None = None) -> Tensor:
    """The dense weight (out, in) of a 4-bit linear in `dtype` (default: the dtype it was quantised from).

    Bit-equal to `bitsandbytes.functional.dequantize_4bit`; inverse of `quantise` up to the 4 bits.
    """
    state = linear.weight.quant_state
    assert not getattr(state, "packing_format_for_cpu", False), "repacked by bitsandbytes: the scales are lost"
    return unpack(linear.weight.data, state, dtype or state.dtype)


def true_numel(parameter: nn.Parameter) -> int:
    """Weights in `parameter`: a 4-bit one packs two into each byte."""
    if isinstance(parameter, Params4bit) and parameter.quant_state is not None:
        return int(parameter.quant_state.shape.numel())
    return parameter.numel()


def dequantize_linear(linear: nn.Module) -> nn.Linear:
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


def dequantize_linears(model: nn.Module) -> nn.Module:
    """Replace every 4-bit linear of `model`, in place, and return `model`."""
    for path, module in list(model.named_modules()):
        if isinstance(module, Linear4bit):
            parent, _, leaf = path.rpartition(".")
            setattr(model.get_submodule(parent), leaf, dequantize_linear(module))
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
