"""computing_in: the same model in another precision, for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from lorafit.backbone.bits import Params4bit
from lorafit.backbone.frozen_linear import FrozenLinear4bit

ADAPTER_MARK = ".lora_"


@contextmanager
def computing_in(model: nn.Module, dtype: torch.dtype) -> Iterator[nn.Module]:
    """`model` computing in `dtype` inside the block: activations, norms, embeddings, dequantised weights.

    Adapter weights stay fp32, as they always are. Every tensor is put back as it was.
    """
    parameters = [
        (parameter, parameter.data)
        for name, parameter in model.named_parameters()
        if parameter.is_floating_point() and not isinstance(parameter, Params4bit) and ADAPTER_MARK not in name
    ]
    linears = [module for module in model.modules() if isinstance(module, FrozenLinear4bit)]
    dtypes = [(linear, linear.compute_dtype) for linear in linears]
    try:
        for parameter, data in parameters:
            parameter.data = data.to(dtype)
        for linear in linears:
            _compute_in(linear, dtype)
        yield model
    finally:
        for parameter, data in parameters:
            parameter.data = data
        for linear, given in dtypes:
            _compute_in(linear, given)


def _compute_in(linear: FrozenLinear4bit, dtype: torch.dtype) -> None:
    linear.compute_dtype = dtype
    if linear.dense is not None:
        linear.keep_dense()
