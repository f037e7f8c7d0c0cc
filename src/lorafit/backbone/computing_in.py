"""Precision switches: context managers that run a model in another precision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lorafit.backbone.bitsandbytes_import import Params4bit
from lorafit.backbone.kernels.frozen_linear import FrozenLinear4bit

ADAPTER_MARK = ".lora_"


@contextmanager
def computing_in(model: nn.Module, dtype: torch.dtype, weights: torch.dtype | None = None) -> Iterator[nn.Module]:
    """Run `model` in `dtype`, never in FP8, inside the block.

    Activations, norms, embeddings and base weights are converted; with `weights`, every base weight is first rounded to
    that dtype. Adapter weights stay fp32. Every tensor is restored afterwards. Use it for evaluation only: the gradient
    does not account for the rounding.
    """
    parameters = [
        (parameter, parameter.data)
        for name, parameter in model.named_parameters()
        if parameter.is_floating_point() and not isinstance(parameter, Params4bit) and ADAPTER_MARK not in name
    ]
    linears = [module for module in model.modules() if isinstance(module, FrozenLinear4bit)]
    before = [(linear, linear.compute_dtype, linear.weight_dtype, linear.fp8) for linear in linears]
    try:
        for parameter, data in parameters:
            parameter.data = data.to(weights or dtype).to(dtype)
        for linear in linears:
            _compute_in(linear, dtype, weights, fp8=False)
        yield model
    finally:
        for parameter, data in parameters:
            parameter.data = data
        for linear, given, rounding, fp8 in before:
            _compute_in(linear, given, rounding, fp8=fp8)


@contextmanager
def rounding_activations(model: nn.Module, dtype: torch.dtype) -> Iterator[nn.Module]:
    """Round the output of each module of `model` to `dtype` inside the block.

    With its weights rounded too, an fp32 model computes the numbers of a model in `dtype` with fp32 sums, as GPUs do.
    It keeps the speed of fp32; many CPUs are ten times slower in bf16. Adapters stay fp32.
    """

    def rounded(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            return value.to(dtype).to(value.dtype)
        return type(value)(map(rounded, value)) if type(value) in (tuple, list) else value

    chosen = [module for name, module in model.named_modules() if ADAPTER_MARK not in name]
    hooks = [module.register_forward_hook(lambda _, __, output: rounded(output)) for module in chosen]
    try:
        yield model
    finally:
        for hook in hooks:
            hook.remove()


def _compute_in(linear: FrozenLinear4bit, dtype: torch.dtype, weights: torch.dtype | None, *, fp8: bool) -> None:
    linear.compute_dtype, linear.weight_dtype, linear.fp8 = dtype, weights, fp8
    if linear.dense is not None:
        linear.keep_dense()
