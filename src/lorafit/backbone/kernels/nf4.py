"""Unpacking a 4-bit weight: bitsandbytes' own three launches, or one Triton kernel that gives the same bits.

The kernel stands in for bitsandbytes on CUDA cards of capability 8.0 and up, once it has shown there that it gives
the same bits; CPUs, other vendors' cards, FP4, and weights whose number is no multiple of 8 keep bitsandbytes' path.
"""

from __future__ import annotations

import importlib.util
import subprocess
from functools import cache

import torch
from torch import Tensor

from lorafit.backbone.bitsandbytes_import import bitsandbytes

if importlib.util.find_spec("triton") is not None:
    from lorafit.backbone.kernels import nf4_kernels
else:
    nf4_kernels = None  # type: ignore[assignment]

NESTED_BLOCK = 256
"""Block size of the second quantisation, fixed in bitsandbytes."""

KERNEL_CAPABILITY = (8, 0)
"""The oldest cards that Triton supports."""

E4M3 = torch.float8_e4m3fn

Scales = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]
"""absmax, nested_code, nested_absmax, nested_offset: the last three None without double quantisation."""

assert bitsandbytes.nn is not None  # importing it registers torch.ops.bitsandbytes


def unpack_weight(
    packed: Tensor, scales: Scales, block: int, quant_type: str, rows: int, columns: int, dtype: torch.dtype
) -> Tensor:
    """The dense weight (rows, columns) in `dtype`, bit-equal to `bitsandbytes.functional.dequantize_4bit`."""
    if kernel_takes(packed, scales, quant_type, rows * columns):
        target = packed.new_empty(rows, columns, dtype=dtype)
        return nf4_kernels.unpack(packed, scales, code_values(packed.device), None, block, target)
    return _unpack_by_bitsandbytes(packed, scales, block, quant_type, rows, columns, dtype)


def unpack_e4m3(
    packed: Tensor, scales: Scales, block: int, row_inverse: Tensor, columns: int, transposed: bool
) -> Tensor:
    """NF4 straight to e4m3 (rows, columns), or with `transposed` (columns, rows), contiguous either way.

    Each value is code · (block scale · row_inverse), rounded once; `row_inverse` (rows,) keeps it within ±448.
    """
    rows = len(row_inverse)
    if kernel_takes(packed, scales, "nf4", rows * columns):
        launch = nf4_kernels.unpack_transposed if transposed else nf4_kernels.unpack
        out = packed.new_empty((columns, rows) if transposed else (rows, columns), dtype=E4M3)
        return launch(packed, scales, code_values(packed.device), row_inverse, block, out)
    scale = block_scales(scales).reshape(rows, -1) * row_inverse[:, None]
    pairs = packed.reshape(-1).int()
    codes = code_values(packed.device)[torch.stack([pairs >> 4, pairs & 15], 1)]
    weight = (codes.reshape(rows, -1, block) * scale[..., None]).reshape(rows, columns).to(E4M3)
    return weight.t().contiguous() if transposed else weight


def kernel_takes(packed: Tensor, scales: Scales, quant_type: str, count: int) -> bool:
    """Whether the Triton kernels can unpack this weight of `count` values, here."""
    return (
        packed.is_cuda
        and quant_type == "nf4"
        and count % 8 == 0
        and packed.dtype == torch.uint8
        and packed.data_ptr() % 4 == 0
        and packed.is_contiguous()
        and scales[0].dtype == (torch.float32 if scales[1] is None else torch.uint8)
        and kernels_work(packed.device.index)
    )


@cache
def kernels_work(device: int) -> bool:
    """Whether Triton is there, builds the kernel for card `device`, and it gives bitsandbytes' bits."""
    if nf4_kernels is None or torch.version.cuda is None:
        return False
    if torch.cuda.get_device_capability(device) < KERNEL_CAPABILITY:
        return False
    weight = torch.linspace(-3, 2, 4096, device=f"cuda:{device}").sin().reshape(32, 128)
    packed, state = bitsandbytes.functional.quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
    scales = (state.absmax, state.state2.code, state.state2.absmax, state.offset)
    table = code_values(weight.device)
    try:
        # twice, for the second launch takes a shorter way
        found = [nf4_kernels.unpack(packed, scales, table, None, 64, torch.zeros_like(weight)) for _ in range(2)]
    except (RuntimeError, TypeError, OSError, subprocess.CalledProcessError):
        return False  # Triton builds its launchers with a C compiler, which not every machine has
    expected = _unpack_by_bitsandbytes(packed, scales, 64, "nf4", 32, 128, torch.float32)
    return all(torch.equal(weight, expected) for weight in found)


@cache
def code_values(device: torch.device) -> Tensor:
    """What the 16 codes of NF4 stand for (fp32), as bitsandbytes has them on `device`."""
    codes = torch.arange(0, 16, 2, device=device, dtype=torch.uint8) * 17 + 1  # 0x01, 0x23, …, 0xEF
    one = torch.ones(1, device=device)
    return torch.ops.bitsandbytes.dequantize_4bit.default(codes[:, None], one, 64, "nf4", [1, 16], one.dtype)[0]


def block_scales(scales: Scales) -> Tensor:
    """The fp32 scale of every block (blocks,)."""
    absmax, code, nested_absmax, offset = scales
    if code is None:
        return absmax.float()
    plain = torch.ops.bitsandbytes.dequantize_blockwise.default(
        absmax, nested_absmax, code, NESTED_BLOCK, torch.float32
    )
    return plain + offset


def _unpack_by_bitsandbytes(
    packed: Tensor, scales: Scales, block: int, quant_type: str, rows: int, columns: int, dtype: torch.dtype
) -> Tensor:
    """Step by step as `bitsandbytes.functional.dequantize_4bit` (QLoRA, arXiv:2305.14314, section 3)."""
    column = packed.reshape(-1, 1)
    return torch.ops.bitsandbytes.dequantize_4bit.default(
        column, block_scales(scales), block, quant_type, [rows, columns], dtype
    )
