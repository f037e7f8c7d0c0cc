"""FrozenExperts: the experts of a layer in 4 bits, multiplied in groups.

The 3-D parameters become modules, `gate_up_proj` becomes `gate_up_proj_4bit`, and all else of transformers' module
stays: gates, biases, norms.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from lorafit.backbone.architecture import kept_in_fp32, text_decoder
from lorafit.backbone.bitsandbytes_import import Params4bit
from lorafit.backbone.kernels.frozen_linear import BLOCK, QUANT_TYPE, FrozenLinear4bit, freeze_linears
from lorafit.backbone.kernels.frozen_linear_op import unpack
from lorafit.backbone.kernels.grouped_product import grouped_product
from lorafit.shapes.shape import MOST_PACKED

SUFFIX = "_4bit"
"""Ending of the name of a parameter's module."""


def expert_names(module: nn.Module) -> tuple[str, ...]:
    """Return the names of the 3-D parameters of `module`; none unless it takes transformers' experts interface.

    The interface (`transformers.integrations.moe.use_experts_implementation`) says how each layout is multiplied:
    weights (experts, out, in), or (experts, in, out) when `is_transposed`, with a fused gate or without one.
    """
    if not all(hasattr(module, mark) for mark in ("_apply_gate", "has_gate", "has_bias", "is_transposed")):
        return ()
    return ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")


def experts_to_quantize(model: nn.Module) -> list[str]:
    """Return the dotted names of the parameters of experts of the text decoder that lorafit quantizes."""
    kept = set(kept_in_fp32(model))
    return [name for name in _stacked(model) if not kept.intersection(name.split("."))]


def _stacked(model: nn.Module) -> Iterator[str]:
    inside = set(text_decoder(model).modules())
    for path, module in model.named_modules():
        names = expert_names(module) if module in inside else ()
        if names and all(map(_packs, (module._parameters.get(name) for name in names))):
            yield from (f"{path}.{name}" for name in names)


def _packs(weight: nn.Parameter | None) -> bool:
    return weight is not None and weight.dim() == 3 and weight.numel() < MOST_PACKED


def transposed_experts(model: nn.Module) -> set[str]:
    """Return the dotted names of the stacked parameters of `model` whose matrices are stored as (in, out)."""
    return {name for name in experts_to_quantize(model) if model.get_submodule(name.rpartition(".")[0]).is_transposed}


def pack(weight: Tensor) -> Params4bit:
    """Return `weight` (experts, rows, columns) in NF4 with double quantization, on its device."""
    flat = weight.detach().reshape(-1, weight.shape[-1])
    packed: Params4bit = Params4bit(
        flat, requires_grad=False, blocksize=BLOCK, compress_statistics=True, quant_type=QUANT_TYPE
    ).to(weight.device)
    packed.stacked = weight.shape
    return packed


class FrozenExpertsLinear(FrozenLinear4bit):
    """Multiply rows, sorted by expert, by each expert's frozen 4-bit matrix.

    Attributes:
        stored: (experts, rows, columns) of the weight.
        is_transposed: True if a matrix is stored as (in, out).
    """

    takes_fp8 = False

    def __init__(self, packed: Params4bit, stored: tuple[int, int, int], is_transposed: bool, dtype: torch.dtype):
        experts, rows, columns = stored
        super().__init__(columns, experts * rows, False, dtype, True, QUANT_TYPE, device="meta")
        self.stored, self.is_transposed = stored, is_transposed
        self.widths = (columns, rows) if is_transposed else (rows, columns)
        """(out, in) of one matrix."""
        packed.module = self
        self.weight = packed
        freeze_linears(self, dtype, 0)

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:  # type: ignore[override]
        """Return `x (rows, in) -> (rows, out)`; expert e has the rows from `offsets[e - 1]` up to `offsets[e]`."""
        return grouped_product(x.to(self.compute_dtype), offsets, self._handle, *self.widths).to(x.dtype)

    def matrices(self) -> Tensor:
        """Return the dense weights (experts, out, in) in the compute dtype; a view of their storage."""
        stacked = self.stacked()
        return stacked.transpose(1, 2) if self.is_transposed else stacked

    def stacked(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the dense weights as stored (experts, rows, columns), in `dtype` or the compute dtype."""
        if dtype is not None:
            return unpack(self.weight.data, self.weight.quant_state, dtype).view(self.stored)
        dense = self.dense
        return (self.unpacked() if dense is None else dense).view(self.stored)


def freeze_experts(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Make the experts of `model` that were packed while loading frozen modules, in place, and return `model`."""
    for module in model.modules():
        for name in expert_names(module):
            weight = module._parameters.get(name)
            if isinstance(weight, Params4bit):
                _freeze(module, name, weight, dtype)
    return model


def quantize_experts(module: nn.Module, dtype: torch.dtype) -> None:
    """Quantize the dense experts of one `module` in place, on their device; they compute in `dtype`."""
    for name in expert_names(module):
        weight = module._parameters[name]
        assert weight is not None and weight.dim() == 3, name
        _freeze(module, name, pack(weight.data), dtype)


def unfreeze_experts(model: nn.Module) -> nn.Module:
    """Make the frozen experts of `model` dense 3-D parameters again, in place, and return `model`."""
    for module in list(model.modules()):
        for name, linear in list(frozen_in(module)):
            delattr(module, f"{name}{SUFFIX}")
            setattr(module, name, nn.Parameter(linear.stacked(linear.compute_dtype), requires_grad=False))
            if isinstance(module, _Grouped):
                module.__class__ = type(module).__mro__[2]
    return model


def frozen_weights(model: nn.Module) -> dict[str, FrozenLinear4bit]:
    """Return the 4-bit layers of `model` by the name of the parameter that each stands for."""
    return {
        path.removesuffix(SUFFIX) if isinstance(module, FrozenExpertsLinear) else f"{path}.weight": module
        for path, module in model.named_modules()
        if isinstance(module, FrozenLinear4bit)
    }


def stacked_experts(model: nn.Module) -> dict[str, tuple[int, int, int]]:
    """Return (experts, in, out) of each stacked parameter of `model`, dense or frozen, by its dotted name."""
    sizes = {}
    for name in experts_to_quantize(model):
        experts, *widths = model.get_parameter(name).shape
        is_transposed = model.get_submodule(name.rpartition(".")[0]).is_transposed
        sizes[name] = (experts, *(widths if is_transposed else reversed(widths)))
    for path, module in model.named_modules():
        if isinstance(module, FrozenExpertsLinear):
            sizes[path.removesuffix(SUFFIX)] = (module.stored[0], *reversed(module.widths))
    return sizes


def frozen_in(module: nn.Module) -> Iterator[tuple[str, FrozenExpertsLinear]]:
    """Yield (parameter's name, frozen linear) of each frozen weight that `module` itself holds."""
    for name, child in module.named_children():
        if isinstance(child, FrozenExpertsLinear):
            yield name.removesuffix(SUFFIX), child


def _freeze(module: nn.Module, name: str, packed: Params4bit, dtype: torch.dtype) -> None:
    stored = tuple(packed.stacked)
    del module._parameters[name]
    setattr(module, f"{name}{SUFFIX}", FrozenExpertsLinear(packed, stored, bool(module.is_transposed), dtype))
    if not isinstance(module, _Grouped):
        module.__class__ = _grouped(type(module))  # type: ignore[arg-type]


@cache
def _grouped(kind: type[nn.Module]) -> type[nn.Module]:
    return type(kind.__name__, (_Grouped, kind), {})


class _Grouped(nn.Module):
    """Compute experts as transformers' `grouped_mm_experts_forward` does, with frozen 4-bit matrices."""

    has_gate: bool
    has_bias: bool
    down_proj_4bit: nn.Module
    down_proj_bias: Tensor
    post_expert_norm: nn.Module
    act_fn: Callable[[Tensor], Tensor]
    _apply_gate: Callable[[Tensor], Tensor]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return the experts' weighted sum, `hidden_states (tokens, hidden) -> (tokens, hidden)`.

        top_k_index and top_k_weights (tokens, experts of a token) name and weigh the experts of each token.
        """
        experts = top_k_index.reshape(-1)
        into = getattr(self, "gate_up_proj_4bit" if self.has_gate else "up_proj_4bit")
        order, inverse, ids, offsets = sorted_by_expert(experts, into.stored[0])
        x = _Dispatched.apply(hidden_states, order, inverse, top_k_index.shape[-1])
        inner = self._activated(into(x, offsets), ids)
        out = self.down_proj_4bit(inner, offsets)
        if self.has_bias:
            out = out + self.down_proj_bias[ids]
        if getattr(self, "has_post_expert_norm", False):
            out = self.post_expert_norm(out)
        # rank 3, as the residual stream: such element-wise operations are recomputed and not kept
        weighted = out[None] * top_k_weights.reshape(-1)[order][None, :, None]
        back = _Permuted.apply(weighted[0], inverse, order)
        return back.view(*top_k_index.shape, -1).sum(1).to(hidden_states.dtype)

    def _activated(self, inner: Tensor, ids: Tensor) -> Tensor:
        if self.has_bias:
            inner = inner + getattr(self, "gate_up_proj_bias" if self.has_gate else "up_proj_bias")[ids]
        activated: Tensor = self._apply_gate(inner[None]) if self.has_gate else self.act_fn(inner[None])
        return activated[0]


def sorted_by_expert(experts: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return order, inverse order, sorted ids and the end of each expert's rows, for the experts (rows,) of all rows.

    Nothing waits for the GPU, and equal experts keep their order, so that a step has the same bits each time.
    """
    ids, order = torch.sort(experts, stable=True)
    each = torch.arange(count, device=experts.device, dtype=experts.dtype)
    return order, torch.argsort(order), ids, torch.searchsorted(ids, each, right=True, out_int32=True)


class _Dispatched(torch.autograd.Function):
    """Copy each token's row once for each of its experts, in the order of experts.

    The gradient sums a token's rows in their own order; indexing's own gradient adds them in any order.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor, copies: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.copies = copies
        return x[order // copies]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (inverse,) = ctx.saved_tensors
        rows = grads[0][inverse]
        return rows.view(-1, ctx.copies, rows.shape[-1]).sum(1), None, None, None


class _Permuted(torch.autograd.Function):
    """Bring rows into another order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x[order]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (inverse,) = ctx.saved_tensors
        return grads[0][inverse], None, None
