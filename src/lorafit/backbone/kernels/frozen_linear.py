"""FrozenLinear4bit: bitsandbytes' 4-bit layer with the frozen op as its forward.

It stays a `bitsandbytes.nn.Linear4bit`, so that PEFT wraps it as usual. On a CPU the weight is dequantized once and
kept. bitsandbytes' own forward never runs: it may repack the 4-bit weight in place (`bitsandbytes/nn/modules.py`,
AVX512-BF16).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorafit.backbone.architecture import DTYPES
from lorafit.backbone.bitsandbytes_import import Linear4bit, Params4bit, QuantState
from lorafit.backbone.kernels.frozen_linear_fp8 import fp8_linear, fp8_row_scales
from lorafit.backbone.kernels.frozen_linear_op import (
    FEW_ROWS,
    MOST_ROWS,
    code_values,
    frozen_linear,
    handle_device,
    handle_for,
    op_arguments,
    traced_linear,
    unpack,
    unpack_e4m3,
)
from lorafit.hardware.detect import available_bytes

DENSE_SHARE = 0.5
"""Share of the free memory that dense copies may take on a CPU by default."""


PRODUCT_SETTINGS = frozenset({"compute_dtype", "weight_dtype", "fp8"})
"""Attributes of a layer that decide how it multiplies."""


class FrozenLinear4bit(Linear4bit):
    """Multiply `x (…, in) -> (…, out)` by a frozen 4-bit weight.

    It is `x @ dequant(W)ᵀ + bias` in `compute_dtype`, returned in the dtype of `x`.
    """

    # dense copies, and the packed weight that they were made from (PEFT's merge replaces it); in a tuple, because a
    # module registers any Parameter that is assigned to it
    _kept: tuple[tuple[Tensor, ...], Params4bit] | None = None
    weight_dtype: torch.dtype | None = None
    """Dtype to which the dequantized weight is rounded before use; None rounds nothing."""
    takes_fp8: bool = True
    packed_product: Callable[..., Tensor] | None = None
    """The kernel that multiplies a few rows by the packed weight (`multiply_packed`), or None."""
    fp8: bool = False
    """Multiply in FP8 if the weight's shape allows it; `compute_dtype` is bf16 then."""
    _scaled: tuple[Tensor, Params4bit] | None = None
    # the arguments of the op, with the weight and the layout that they were read from
    _packed: tuple[tuple[Any, ...], Params4bit, QuantState] | None = None
    _handle: Tensor
    # the name of `compute_dtype` if the layer only dequantizes and multiplies, else None. It is a string because
    # torch.compile skips the guards of an unchanged module only if it read strings, numbers and tensors there: no
    # dtype, and no property of the class
    _lean: str | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output; the gradient flows to `x` only."""
        if self._lean is not None and torch.compiler.is_compiling():
            return self._traced(x, DTYPES[self._lean])
        if x.dtype is not self.compute_dtype:
            return self.forward(x.to(self.compute_dtype)).to(x.dtype)
        row_scales = self.row_scales
        if row_scales is not None:
            y = fp8_linear(x, row_scales, self._handle, self.out_features, self.in_features)
            return y if self.bias is None else y + self.bias
        if self.weight_dtype is None and torch.compiler.is_compiling():
            return self._traced(x, self.compute_dtype)
        dense = self.dense
        if dense is not None:
            return F.linear(x, dense, self.bias)
        if self.weight_dtype is not None:
            return F.linear(x, self.unpacked(), self.bias)
        y = self._by_packed(x) if self._takes_few(x) else frozen_linear(x, *self.packed(), False)
        return y if self.bias is None else y + self.bias

    def _takes_few(self, x: Tensor) -> bool:
        """Return True for rows that `packed_product` takes: more than bitsandbytes' kernel is fast for, no gradient."""
        if self.packed_product is None or torch.is_grad_enabled():
            return False
        return FEW_ROWS < x.numel() // self.in_features <= MOST_ROWS

    def _by_packed(self, x: Tensor) -> Tensor:
        packed, *scales, _, _, _, _ = self.packed()
        assert self.packed_product is not None
        return self.packed_product(x, packed, tuple(scales), code_values(packed.device))

    def _traced(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        y = traced_linear(x.to(dtype), self._handle, self.out_features, self.in_features)
        return (y if self.bias is None else y + self.bias).to(x.dtype)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in PRODUCT_SETTINGS:
            plain = self.weight_dtype is None and not self.fp8
            names = (word for word, dtype in DTYPES.items() if dtype is self.compute_dtype)
            super().__setattr__("_lean", next(names, None) if plain else None)

    def packed(self) -> tuple[Any, ...]:
        """Return the op's arguments for the current weight, in plain tensors.

        Each call on a Params4bit goes through its `__torch_function__` (4 µs), and the op makes eight. So a plain
        alias is kept, with the weight and layout that it was made from.
        """
        weight, kept = self._parameters["weight"], self._packed
        if kept is None or not _is_current(kept, weight):
            with torch._C.DisableTorchFunctionSubclass():
                plain = weight.detach().as_subclass(Tensor)
            kept = self._packed = op_arguments(plain, weight.quant_state), weight, weight.quant_state
        return kept[0]

    def held(self) -> tuple[Any, ...]:
        """Return the tensors that the layer holds beside its parameters.

        They are the packed weight, its scales and layout, and the dense copies.
        """
        return (*self.packed(), self.row_scales, *self.copies)

    def unpacked(self) -> Tensor:
        """Return the dequantized weight (out, in), computed anew."""
        rounding = self.weight_dtype or self.compute_dtype
        return unpack(self.weight.data, self.weight.quant_state, rounding).to(self.compute_dtype)

    @property
    def copies(self) -> tuple[Tensor, ...]:
        """Return the kept dense copies; empty if the weight is dequantized on each call.

        They are the dequantized weight (out, in), or in FP8 the e4m3 weight and its transpose.
        """
        kept = self._kept
        return kept[0] if kept is not None and kept[1] is self.weight else ()

    @property
    def dense(self) -> Tensor | None:
        """Return the kept dequantized weight (out, in), or None if it is dequantized on each call."""
        copies = self.copies
        return copies[0] if len(copies) == 1 else None

    def keep_dense(self) -> None:
        """Dequantize the weight once and keep the result, `dense_bytes` large.

        Compiled code still calls the operator, which then finds the copy. So a copy changes no compiled code.
        """
        scales = self.row_scales
        if scales is None:
            self._kept = (self.unpacked(),), self.weight
        else:
            packed, *rest, _, in_features, block, _ = self.packed()
            both = (unpack_e4m3(packed, tuple(rest), block, scales[1], in_features, way) for way in (False, True))
            self._kept = tuple(both), self.weight

    def drop_dense(self) -> None:
        """Drop the copies of `keep_dense`; the weight is then dequantized on each call."""
        self._kept = None

    @property
    def row_scales(self) -> Tensor | None:
        """Return the scales that FP8 needs beside the packed weight (`fp8_row_scales`).

        None if the layer does not multiply in FP8.
        """
        kept = self._scaled
        return kept[0] if self.fp8 and kept is not None and kept[1] is self.weight else None

    def scale_rows(self) -> None:
        """Compute the row scales of the current weight, for a layer in FP8 whose shape allows it."""
        self._scaled = None
        if self.fp8 and self.weight.device.type != "meta":
            scales = fp8_row_scales(self.weight.data, self.weight.quant_state)
            self._scaled = None if scales is None else (scales, self.weight)

    def dense_bytes(self) -> int:
        """Return the size of the copies that `keep_dense` makes.

        In FP8 it is the same, twice one byte a weight.
        """
        return int(self.out_features * self.in_features * self.compute_dtype.itemsize)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # a copied layer needs its own handle: the one that was copied is the original's
        super().__setstate__(state)
        self._packed, self._handle = None, handle_for(self, self.weight.device)

    def _apply(self, fn: Callable[..., Tensor], recurse: bool = True) -> nn.Module:
        # callers may call `.to` for the current device: dense copies of a weight that did not move stay
        place = self.weight.device, self.weight.data_ptr()
        moved = super()._apply(fn, recurse)
        if (self.weight.device, self.weight.data_ptr()) == place:
            return moved
        # dense copies and handles of a moved weight are on the wrong device
        kept = self._kept is not None
        self.drop_dense()
        self._packed = None
        self.scale_rows()
        if self._handle.device != handle_device(self.weight.device):
            self._handle = handle_for(self, self.weight.device)
        if kept and self.weight.device in (place[0], torch.device("cpu")):
            self.keep_dense()
        return moved


def freeze_linears(
    model: nn.Module,
    compute_dtype: torch.dtype | None = None,
    dense_budget_bytes: int | None = None,
    *,
    fp8: bool = False,
) -> nn.Module:
    """Make every 4-bit linear of `model` a FrozenLinear4bit, in place, and return `model`.

    Linears compute in `compute_dtype` (default: the one they have), with `fp8` in FP8 if their shape allows it
    (in and out features multiples of 16) and exactly otherwise. Those on a CPU, if not in FP8, keep a dense copy,
    first layer first, as long as `dense_budget_bytes` lasts (default: half of the free memory; 0 keeps none).
    """
    budget = int(available_bytes() * DENSE_SHARE) if dense_budget_bytes is None else dense_budget_bytes
    for linear in [module for module in model.modules() if isinstance(module, Linear4bit)]:
        _freeze(linear, compute_dtype, fp8)
        size = linear.dense_bytes()
        if linear.weight.device.type == "cpu" and linear.row_scales is None and size <= budget:
            linear.keep_dense()
            budget -= size
    return model


def refresh_linears(model: nn.Module) -> None:
    """Let the 4-bit linears of `model` find weights that were moved in place, and drop their dense copies."""
    for linear in model.modules():
        if isinstance(linear, FrozenLinear4bit):
            linear.drop_dense()
            linear._packed, linear._handle = None, handle_for(linear, linear.weight.device)


def _is_current(kept: tuple[tuple[Any, ...], Params4bit, QuantState], weight: Params4bit) -> bool:
    """Return True if the arguments in `kept` still belong to `weight`.

    Data and scales of a weight may be replaced in place.
    """
    arguments, source, state = kept
    if source is not weight or state is not weight.quant_state or arguments[1] is not state.absmax:
        return False
    with torch._C.DisableTorchFunctionSubclass():
        return bool(arguments[0].data_ptr() == weight.data_ptr())


def _freeze(linear: Linear4bit, compute_dtype: torch.dtype | None, fp8: bool) -> None:
    assert type(linear) is Linear4bit or isinstance(linear, FrozenLinear4bit), f"{type(linear)} overrides forward"
    assert not getattr(linear.weight.quant_state, "packing_format_for_cpu", False), "bitsandbytes repacked the weight"
    if not isinstance(linear, FrozenLinear4bit):
        linear.__class__ = FrozenLinear4bit
    linear.compute_dtype = compute_dtype or linear.compute_dtype or linear.weight.quant_state.dtype
    linear.compute_type_is_set = True
    linear.requires_grad_(False)
    if linear.bias is not None:
        linear.bias.data = linear.bias.data.to(linear.compute_dtype)
    linear.drop_dense()
    linear._packed, linear._handle = None, handle_for(linear, linear.weight.device)
    assert not fp8 or linear.compute_dtype is torch.bfloat16, "FP8 matmuls return bf16"
    linear.fp8 = fp8 and linear.takes_fp8
    linear.scale_rows()


QUANT_TYPE = "nf4"
BLOCK = 64


def quantize(
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    compute_dtype: torch.dtype | None = None,
    block: int = BLOCK,
    double: bool = True,
    dense_budget_bytes: int | None = 0,
) -> FrozenLinear4bit:
    """Return the NF4 linear of `weight` (out, in), quantized on its device.

    `double` quantizes the scales too. The linear computes in `compute_dtype`, by default the weight's own. The numbers
    are those of bitsandbytes' own loading.
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


def dequantize(linear: Linear4bit, dtype: torch.dtype | None = None) -> Tensor:
    """Return the dense weight (out, in) of a 4-bit linear in `dtype`.

    The default is the dtype that it was quantized from. Bit-equal to `bitsandbytes.functional.dequantize_4bit`; inverse
    of `quantize` up to the 4 bits.
    """
    state = linear.weight.quant_state
    assert not getattr(state, "packing_format_for_cpu", False), (
        "bitsandbytes repacked the weight, so its scales are lost"
    )
    return unpack(linear.weight.data, state, dtype or state.dtype)


def true_numel(parameter: nn.Parameter) -> int:
    """Return the number of weights in `parameter`; a 4-bit parameter packs two into each byte."""
    if isinstance(parameter, Params4bit) and parameter.quant_state is not None:
        return int(parameter.quant_state.shape.numel())
    return parameter.numel()


def dequantize_linear(linear: nn.Module) -> nn.Linear:
    """Return a plain linear with the dequantized weight (out, in) in the layer's compute dtype.

    A plain `linear` is returned as it is.
    """
    if not isinstance(linear, Linear4bit):
        assert isinstance(linear, nn.Linear), type(linear)
        return linear
    weight = dequantize(linear, linear.compute_dtype)
    plain = nn.Linear(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
    plain.weight = nn.Parameter(weight, requires_grad=False)
    if linear.bias is not None:
        plain.bias = nn.Parameter(linear.bias.detach().to(weight.dtype), requires_grad=False)
    return plain.train(linear.training)


def dequantize_linears(model: nn.Module) -> nn.Module:
    """Replace every 4-bit linear of `model` by a plain one, in place, and return `model`."""
    for path, module in list(model.named_modules()):
        if isinstance(module, Linear4bit):
            parent, _, leaf = path.rpartition(".")
            setattr(model.get_submodule(parent), leaf, dequantize_linear(module))
    return model


def forget_quantization(model: Any) -> Any:
    """Remove transformers' 4-bit marks from `model`, and return it.

    It then saves and moves as a plain model.
    """
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.is_loaded_in_4bit = model.is_quantized = False
    for name in ("hf_quantizer", "quantization_method"):
        if hasattr(model, name):
            delattr(model, name)
    return model
