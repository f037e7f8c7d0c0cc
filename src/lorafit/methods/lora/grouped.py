"""GroupedAdapters: many LoRA adapters on one frozen base, chosen for each row of a batch.

The update of all rows is one gather and two batched products (BGMV in Punica, arXiv:2310.18547). Nothing depends on
the values of the rows' indices, so the forward pass has static shapes and needs no word from the host.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lorafit.backbone import linear_size
from lorafit.errors import AdapterError

NONE = 0
"""Slot of the base: its update is zero."""


class _Stack:
    """Hold one linear's adapters: a (slots, rank, in), b (slots, out, rank), scale (slots, 1, 1); all fp32."""

    def __init__(self, slots: int, rank: int, in_features: int, out_features: int, device: torch.device) -> None:
        self.a = torch.zeros(slots, rank, in_features, device=device)
        self.b = torch.zeros(slots, out_features, rank, device=device)
        self.scale = torch.zeros(slots, 1, 1, device=device)

    def put(self, slot: int, a: Tensor, b: Tensor, scale: float) -> None:
        rank = a.shape[0]
        if rank > self.a.shape[1]:
            self._widen(1 << (rank - 1).bit_length())
        self.clear(slot)
        self.a[slot, :rank].copy_(a)
        self.b[slot, :, :rank].copy_(b)
        self.scale[slot].fill_(scale)

    def clear(self, slot: int) -> None:
        for tensor in (self.a, self.b, self.scale):
            tensor[slot].zero_()

    def _widen(self, rank: int) -> None:
        slots, old, _ = self.a.shape
        more = rank - old
        self.a = torch.cat([self.a, self.a.new_zeros(slots, more, self.a.shape[2])], 1)
        self.b = torch.cat([self.b, self.b.new_zeros(slots, self.b.shape[1], more)], 2)

    def update(self, x: Tensor, index: Tensor) -> Tensor:
        """Return the update (rows, tokens, out) of `x` (rows, tokens, in), in fp32."""
        low = torch.bmm(x.to(self.a.dtype), self.a[index].mT)
        return torch.bmm(low, self.b[index].mT) * self.scale[index]


class GroupedAdapters:
    """Add the adapter that each row names to the linears of a frozen model, by forward hooks.

    Attributes:
        slots: number of adapters in memory; slot 0 is the base.
    """

    def __init__(self, model: nn.Module, slots: int) -> None:
        self.model, self.slots = model, slots + 1
        self._stacks: dict[str, _Stack] = {}
        self._index: Tensor | None = None

    def put(self, slot: int, weights: Mapping[str, tuple[Tensor, Tensor]], scale: float) -> None:
        """Write A (r, in) and B (out, r) of each module in `weights` into `slot`. Other modules of it are cleared."""
        assert 0 < slot < self.slots, slot
        self.clear(slot)
        for name, (a, b) in weights.items():
            self._stack_of(name, rank=a.shape[0]).put(slot, a, b, scale)

    def clear(self, slot: int) -> None:
        """Make `slot` answer as the base."""
        for stack in self._stacks.values():
            stack.clear(slot)

    @contextmanager
    def rows(self, index: Tensor) -> Iterator[None]:
        """Within the block, row i of a batch uses the adapter in slot `index[i]`; index (rows,) is int64."""
        self._index = index
        try:
            yield
        finally:
            self._index = None

    def size_bytes(self) -> int:
        """Return the bytes of all slots."""
        return sum(t.nbytes for stack in self._stacks.values() for t in (stack.a, stack.b, stack.scale))

    def _stack_of(self, name: str, rank: int) -> _Stack:
        if name not in self._stacks:
            linear: Any = self.model.get_submodule(name)
            width = 1 << (rank - 1).bit_length()
            device = linear.weight.device
            stack = self._stacks[name] = _Stack(self.slots, width, *linear_size(linear), device)
            linear.register_forward_hook(self._hook(name, stack))
        return self._stacks[name]

    def _hook(self, name: str, stack: _Stack) -> Any:
        def add(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
            index, x = self._index, inputs[0]
            if index is None:
                return output
            if x.ndim != 3 or x.shape[0] != len(index):
                what = f"{name} mixes the rows of a batch, so adapters on it cannot be served together"
                raise AdapterError(what, fix="merge the run, and serve the merged model")
            return (output + stack.update(x, index)).to(output.dtype)

        return add


@contextmanager
def dense_adapter(model: nn.Module, weights: Mapping[str, tuple[Tensor, Tensor]], scale: float) -> Iterator[None]:
    """Within the block, `model` has one adapter as dense updates `scale · B @ A` (out, in): the reference of a slot."""
    handles = []
    for name, (a, b) in weights.items():
        linear: Any = model.get_submodule(name)
        dense = ((b.float() @ a.float()) * scale).to(linear.weight.device)

        def add(module: nn.Module, inputs: tuple[Any, ...], output: Tensor, dense: Tensor = dense) -> Tensor:
            return (output + inputs[0].float() @ dense.T).to(output.dtype)

        handles.append(linear.register_forward_hook(add))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
