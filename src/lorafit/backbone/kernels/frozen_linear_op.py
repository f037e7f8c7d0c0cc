"""Frozen linear op: a matmul with a 4-bit weight, dequantized by bitsandbytes or one Triton kernel.

bitsandbytes needs three launches, and the kernel gives the same bits in one. The kernel replaces it on CUDA GPUs of
capability 8.0 and up, after a check on that GPU that the bits are the same. CPUs, other vendors' GPUs, FP4, and
weights whose number is no multiple of 8 keep bitsandbytes' path.
"""

from __future__ import annotations

import importlib.util
import subprocess
from functools import cache
from itertools import count
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from lorafit.backbone.bitsandbytes_import import QuantState, bitsandbytes

if importlib.util.find_spec("triton") is not None:
    from lorafit.backbone.kernels import nf4_kernels
else:
    nf4_kernels = None  # type: ignore[assignment]

NESTED_BLOCK = 256
"""Block size of the second quantization, fixed in bitsandbytes."""

KERNEL_CAPABILITY = (8, 0)
"""Compute capability of the oldest GPUs that Triton supports."""

E4M3 = torch.float8_e4m3fn

Scales = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]
"""Scales `absmax, nested_code, nested_absmax, nested_offset`: the last three None without double quantization."""

assert bitsandbytes.nn is not None  # importing it registers torch.ops.bitsandbytes


def unpack_weight(
    packed: Tensor, scales: Scales, block: int, quant_type: str, rows: int, columns: int, dtype: torch.dtype
) -> Tensor:
    """Return the dense weight (rows, columns) in `dtype`.

    Bit-equal to `bitsandbytes.functional.dequantize_4bit`.
    """
    if kernel_takes(packed, scales, quant_type, rows * columns):
        target = packed.new_empty(rows, columns, dtype=dtype)
        return nf4_kernels.unpack(packed, scales, code_values(packed.device), None, block, target)
    return _unpack_by_bitsandbytes(packed, scales, block, quant_type, rows, columns, dtype)


def unpack_e4m3(
    packed: Tensor, scales: Scales, block: int, row_inverse: Tensor, columns: int, transposed: bool
) -> Tensor:
    """Return an NF4 weight in e4m3 as (rows, columns), or with `transposed` as (columns, rows).

    The result is contiguous. Each value is code · (block scale · row_inverse), rounded once; `row_inverse` (rows,)
    keeps it within ±448.
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
    """Return True if the Triton kernels can dequantize this weight of `count` values on its device."""
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
    """Return True if Triton builds the kernel for GPU `device`, and the kernel gives bitsandbytes' bits."""
    if nf4_kernels is None or torch.version.cuda is None:
        return False
    if torch.cuda.get_device_capability(device) < KERNEL_CAPABILITY:
        return False
    weight = torch.linspace(-3, 2, 4096, device=f"cuda:{device}").sin().reshape(32, 128)
    packed, state = bitsandbytes.functional.quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
    scales = (state.absmax, state.state2.code, state.state2.absmax, state.offset)
    table = code_values(weight.device)
    try:
        # twice: the second launch takes a shorter path
        found = [nf4_kernels.unpack(packed, scales, table, None, 64, torch.zeros_like(weight)) for _ in range(2)]
    except (RuntimeError, TypeError, OSError, subprocess.CalledProcessError):
        return False  # Triton builds its launchers with a C compiler, which not every machine has
    expected = _unpack_by_bitsandbytes(packed, scales, 64, "nf4", 32, 128, torch.float32)
    return all(torch.equal(weight, expected) for weight in found)


@cache
def code_values(device: torch.device) -> Tensor:
    """Return the values (16,) of the NF4 codes in fp32, as bitsandbytes has them on `device`."""
    codes = torch.arange(0, 16, 2, device=device, dtype=torch.uint8) * 17 + 1  # 0x01, 0x23, …, 0xEF
    one = torch.ones(1, device=device)
    return torch.ops.bitsandbytes.dequantize_4bit.default(codes[:, None], one, 64, "nf4", [1, 16], one.dtype)[0]


def block_scales(scales: Scales) -> Tensor:
    """Return the fp32 scale of every block (blocks,)."""
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
    """Return the dense weight, step by step as `bitsandbytes.functional.dequantize_4bit`.

    Source: QLoRA, arXiv:2305.14314, section 3.
    """
    column = packed.reshape(-1, 1)
    return torch.ops.bitsandbytes.dequantize_4bit.default(
        column, block_scales(scales), block, quant_type, [rows, columns], dtype
    )


class PackedLinear(Protocol):
    """A layer that holds a packed weight."""

    _handle: Tensor

    def packed(self) -> tuple[Any, ...]:
        """Return the current arguments of `frozen_linear` between `x` and `transposed`, in plain tensors."""

    @property
    def copies(self) -> tuple[Tensor, ...]:
        """Return the kept dense copies: none, the dense weight, or in FP8 the e4m3 weight and its transpose."""

    @property
    def dense(self) -> Tensor | None:
        """Return the kept dense weight, or None."""


_NUMBERS = count()
_LINEARS: WeakValueDictionary[int, PackedLinear] = WeakValueDictionary()


def handle_for(linear: PackedLinear, device: torch.device) -> Tensor:
    """Return a new handle (1,) int64 for the weight of `linear` on `device`.

    The handle is valid while `linear` lives. It is on the weight's GPU, if there is one: if one input of an operator is
    not on the GPU, the compiler treats the operator's output as unaligned, and its readers cannot load 16 bytes at a
    time (`has_unaligned_input` in torch/_inductor/ir.py). A GPU handle is looked up by its address, since reading its
    value would wait for the GPU.
    """
    number = next(_NUMBERS)
    handle = torch.tensor([number], device=handle_device(device))
    _LINEARS[number] = linear
    if handle.is_cuda:
        _LINEARS[handle.data_ptr()] = linear
    return handle


def handle_device(weight: torch.device) -> torch.device:
    """Return the device of a weight's handle: the weight's GPU, else the CPU.

    While a base is loaded, its weights may be on a device that holds no values (meta).
    """
    return weight if weight.type == "cuda" else torch.device("cpu")


def linear_of(handle: Tensor) -> PackedLinear:
    """Return the layer whose weight `handle` stands for."""
    linear = _LINEARS.get(handle.data_ptr()) if handle.is_cuda else None
    # the address may now hold a newer handle than the registered one
    if linear is None or linear._handle.data_ptr() != handle.data_ptr():
        linear = _LINEARS.get(int(handle.item()))
    assert linear is not None, "the layer of a frozen weight is gone before its backward has run"
    return linear


FEW_ROWS = 16
"""Most rows of x for which bitsandbytes' fused kernel is faster; training has thousands."""

MOST_ROWS = 64
"""Most rows of x for the kernel of `nf4_product`."""

TENSORS = 5
"""Number of tensors in the result of `op_arguments`; numbers follow."""

SCHEMA = (
    "frozen_linear(Tensor x, Tensor packed, Tensor absmax, Tensor? nested_code, Tensor? nested_absmax,"
    " Tensor? nested_offset, SymInt out_features, SymInt in_features, SymInt block, str quant_type,"
    " bool transposed) -> Tensor"
)

# a bare Library costs 18 µs a call, and torch.library.custom_op 28 (compiled code, one core of a server CPU); a step
# of an 8B model makes 448 calls
LIBRARY = torch.library.Library("lorafit", "FRAGMENT")
LIBRARY.define(SCHEMA, tags=[torch.Tag.pt2_compliant_tag])


def _frozen_linear(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_code: Tensor | None,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    out_features: int,
    in_features: int,
    block: int,
    quant_type: str,
    transposed: bool,
) -> Tensor:
    rows = x.numel() // x.shape[-1] if x.shape[-1] else 0
    if x.is_cuda and not transposed and 0 < rows <= FEW_ROWS and in_features % block == 0:
        return few_rows(x, packed, absmax, nested_code, nested_absmax, nested_offset, out_features, block, quant_type)
    scales = (absmax, nested_code, nested_absmax, nested_offset)
    weight = unpack_weight(packed, scales, block, quant_type, out_features, in_features, x.dtype)
    return x @ (weight if transposed else weight.t())


def few_rows(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_code: Tensor | None,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    out_features: int,
    block: int,
    quant_type: str,
) -> Tensor:
    """Return `x (…, in) -> (…, out)` in one kernel that never writes the dense weight.

    Generation spends most of its time in it.
    """
    nested = nested_code is not None
    return torch.ops.bitsandbytes.gemm_4bit.default(
        x.contiguous(),
        packed.reshape(-1, 1),
        [out_features, x.shape[-1]],
        nested_absmax if nested else absmax,
        block,
        quant_type,
        absmax_8bit=absmax if nested else None,
        absmax_code=nested_code,
        absmax_offset=nested_offset,
    )


def _shape_only(x: Tensor, *weight: Any) -> Tensor:
    out_features, in_features, _, _, transposed = weight[5:]
    return x.new_empty(*x.shape[:-1], in_features if transposed else out_features)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, *weight, transposed = inputs
    ctx.save_for_backward(*weight[:TENSORS])
    ctx.layout, ctx.transposed = weight[TENSORS:], transposed


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_x = frozen_linear(grad.contiguous(), *ctx.saved_tensors, *ctx.layout, not ctx.transposed)
    return (grad_x, *(None,) * 10)


LIBRARY.impl("frozen_linear", _frozen_linear, "CompositeExplicitAutograd")
torch.library.register_fake("lorafit::frozen_linear", _shape_only, lib=LIBRARY)
torch.library.register_autograd("lorafit::frozen_linear", _gradient, setup_context=_remember, lib=LIBRARY)

frozen_linear = torch.ops.lorafit.frozen_linear.default
"""Multiply `x (…, in) -> (…, out)` in the dtype of `x`; see SCHEMA.

With `transposed` it is `x (…, out) -> (…, in)`. `packed` holds W (out, in) in 4 bits with one scale per `block`
values. With `nested_*`, `absmax` is itself quantized to 8 bits (double quantization). The gradient flows to `x` only.
"""


PRODUCT = "frozen_product(Tensor x, Tensor handle, SymInt out_features, SymInt in_features, bool transposed) -> Tensor"
LIBRARY.define(PRODUCT, tags=[torch.Tag.pt2_compliant_tag])


def _frozen_product(x: Tensor, handle: Tensor, out_features: int, in_features: int, transposed: bool) -> Tensor:
    linear = linear_of(handle)
    dense = linear.dense
    if dense is not None:
        return x @ (dense if transposed else dense.t())
    arguments = (x, *linear.packed(), transposed)
    return _frozen_linear(*arguments)


def _product_shape(x: Tensor, handle: Tensor, out_features: int, in_features: int, transposed: bool) -> Tensor:
    return x.new_empty(*x.shape[:-1], in_features if transposed else out_features)


LIBRARY.impl("frozen_product", _frozen_product, "CompositeExplicitAutograd")
torch.library.register_fake("lorafit::frozen_product", _product_shape, lib=LIBRARY)

frozen_product = torch.ops.lorafit.frozen_product.default
"""Multiply as `frozen_linear`, by a weight's handle and without a gradient.

Compiled code calls it. A handle saves four tensors a weight, and autograd's Python in each of the hundreds of calls of
a step. If the weight's layer keeps a dense copy, the operator multiplies by that copy.
"""


def traced_linear(x: Tensor, handle: Tensor, out_features: int, in_features: int) -> Tensor:
    """Return `frozen_linear` by the weight behind `handle`, for compiled code, with the same gradient."""
    result: Tensor = _TracedLinear.apply(x, handle, out_features, in_features)
    return result


class _TracedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, handle: Tensor, out_features: int, in_features: int) -> Tensor:
        ctx.save_for_backward(handle)
        ctx.features = out_features, in_features
        return frozen_product(x, handle, out_features, in_features, False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (handle,) = ctx.saved_tensors
        return frozen_product(grads[0].contiguous(), handle, *ctx.features, True), None, None, None


def op_arguments(packed: Tensor, state: QuantState) -> tuple[Any, ...]:
    """Return the arguments of `frozen_linear` between `x` and `transposed`, for a weight packed by bitsandbytes."""
    if state.nested:
        assert state.state2.blocksize == NESTED_BLOCK, state.state2.blocksize
        nested = (state.state2.code, state.state2.absmax, state.offset)
    else:
        nested = (None, None, None)
    return (packed, state.absmax, *nested, *state.shape, state.blocksize, state.quant_type)


def unpack(packed: Tensor, state: QuantState, dtype: torch.dtype) -> Tensor:
    """Return the dense weight (out, in) in `dtype`, as the op multiplies by it."""
    _, *scales, out_features, in_features, block, quant_type = op_arguments(packed, state)
    return unpack_weight(packed, tuple(scales), block, quant_type, out_features, in_features, dtype)
