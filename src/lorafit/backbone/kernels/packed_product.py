"""packed_product: which layers multiply a few rows by their packed weight, after each was tried on its own weight."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from lorafit.backbone.kernels.frozen_linear import FrozenLinear4bit
from lorafit.backbone.kernels.frozen_linear_op import FEW_ROWS, code_values, unpack_weight

LOG = logging.getLogger("lorafit.backbone")

HOPPER = (9, 0)
"""Compute capability of the GPUs that have the kernel's matrix instruction."""
LEAST_WEIGHTS = 2**23
"""Weights from which the kernel is faster: at 64 rows on an H200 it takes 0.56 of the time at 14,336 x 4,096, and 0.96
at 4,096 x 4,096, where 1,024 x 4,096 takes 1.2 (`bench/notebook/2026-12-01.md`)."""
MOST_ERROR = 1e-2
"""Largest relative difference from the product with the dense weight; two orders of summing differ by 1e-4."""


@torch.inference_mode()
def multiply_packed(model: nn.Module) -> int:
    """Let 4-bit linears multiply 17 to 64 rows without gradient by their packed weights. Returns their number.

    A layer of `model` does if its GPU and shape suit the kernel, if it is large enough to gain, and if the kernel gives
    on its weight what the dense weight gives.
    """
    linears = [module for module in model.modules() if isinstance(module, FrozenLinear4bit)]
    for linear in linears:
        linear.packed_product = _product_for(linear)
    return sum(linear.packed_product is not None for linear in linears)


def _product_for(linear: FrozenLinear4bit) -> Callable[..., Tensor] | None:
    """Return the kernel if `linear` shall use it, else None."""
    packed, *scales, out_features, in_features, block, quant_type = linear.packed()
    suits = (
        packed.is_cuda
        and torch.cuda.get_device_capability(packed.device) == HOPPER
        and (quant_type, linear.compute_dtype, linear.weight_dtype) == ("nf4", torch.bfloat16, None)
        and linear.dense is None
        and not linear.fp8
        and out_features * in_features >= LEAST_WEIGHTS
    )
    module = _kernel() if suits else None
    if module is None or block != module.SCALE_BLOCK or not module.takes_shape(out_features, in_features):
        return None
    generator = torch.Generator(packed.device).manual_seed(0)
    x = torch.randn(FEW_ROWS + 1, in_features, generator=generator, device=packed.device, dtype=torch.bfloat16)
    wanted = x @ unpack_weight(packed, tuple(scales), block, quant_type, out_features, in_features, x.dtype).t()
    try:
        found = module.product(x, packed, tuple(scales), code_values(packed.device))
    except Exception as error:  # noqa: BLE001 (Gluon is experimental, and the dense product is always there)
        LOG.info("4-bit weights are dequantized before each product: %s", str(error).splitlines()[0])
        return None
    difference = (found - wanted).float().norm() / wanted.float().norm().clamp(min=1e-30)
    return module.product if difference <= MOST_ERROR else None


@cache
def _kernel() -> Any:
    """Return the module of the kernel, or None if Triton is missing or names its parts otherwise."""
    try:
        return importlib.import_module("lorafit.backbone.kernels.nf4_product")
    except (ImportError, AttributeError):
        return None
