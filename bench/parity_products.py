"""Backward's bf16 products on a CPU without units for bf16, where torch's kernel takes 20 times as long as fp32's."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

SLOW = torch.ops.aten.mm.default


class ThroughFp64(TorchDispatchMode):
    """A product by a matrix that is not transposed is summed in fp64 and rounded once, whoever asks for it.

    In fp32 the order of a sum, and with it the bits, would depend on how many rows are multiplied at once. Forward's
    products, by a transposed weight, are quick enough, and bitsandbytes' are out of reach: both sides keep torch's.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is SLOW and args[1].is_contiguous() and all(matrix.dtype is torch.bfloat16 for matrix in args):
            return func(*(matrix.double() for matrix in args)).bfloat16()
        return func(*args, **(kwargs or {}))


def quick_products() -> AbstractContextManager[Any]:
    """Within it backward is quick in bf16 on a CPU; a GPU needs no help."""
    return nullcontext() if torch.cuda.is_available() else ThroughFp64()
