"""GroupedAdapters: many LoRA adapters on one frozen base, chosen for each row of a batch.

The update of all rows is two products. Nothing depends on the values of the rows' indices, so the forward pass has
static shapes and needs no word from the host. Source: BGMV and SGMV in Punica (arXiv:2310.18547).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorafit.backbone import linear_size
from lorafit.errors import AdapterError

MASKED_SLOTS = 2
"""Most slots for each row of a batch with which all slots are multiplied; with more, each row's own is gathered."""


class _Stack:
    """Hold one linear's adapters: a (slots, rank, in) and b (slots, rank, out), the scale within b.

    Slot 0 is the base's: its update is zero. On a CPU they are in fp32. On a GPU they have the linear's dtype, as its
    tensor cores multiply no fp32.
    """

    def __init__(self, slots: int, rank: int, in_features: int, out_features: int, like: Tensor) -> None:
        self.a = torch.zeros(slots, rank, in_features, device=like.device, dtype=like.dtype)
        self.b = torch.zeros(slots, rank, out_features, device=like.device, dtype=like.dtype)

    def put(self, slot: int, a: Tensor, b: Tensor, scale: float) -> bool:
        """Write an adapter into `slot`. Returns True if the stack moved in memory to make room for its rank."""
        rank = a.shape[0]
        moves = rank > self.a.shape[1]
        if moves:
            more = (1 << (rank - 1).bit_length()) - self.a.shape[1]
            self.a, self.b = (F.pad(tensor, (0, 0, 0, more)) for tensor in (self.a, self.b))
        self.clear(slot)
        self.a[slot, :rank].copy_(a)
        self.b[slot, :rank].copy_(b.float().mT * scale)
        return moves

    def clear(self, slot: int) -> None:
        for tensor in (self.a, self.b):
            tensor[slot].zero_()

    def add_to(self, output: Tensor, x: Tensor, rows: _Rows) -> Tensor:
        """Return `output` (rows, tokens, out) plus the update of `x` (rows, tokens, in)."""
        x = x.to(self.a.dtype)
        if rows.others is None:
            low = torch.bmm(x, self.a[rows.index].mT)
            return (output + torch.bmm(low, self.b[rows.index])).to(output.dtype)
        slots, rank, width = self.a.shape
        low = F.linear(x, self.a.view(slots * rank, width)).unflatten(-1, (slots, rank))
        # filled, and not multiplied by zero: infinite values of another row's adapter must not become NaN here
        low = low.masked_fill_(rows.others[:, None, :, None], 0).view(-1, slots * rank)
        flat, b = output.reshape(-1, output.shape[-1]), self.b.view(slots * rank, -1)
        added = torch.addmm(flat, low, b) if flat.dtype is b.dtype else flat + low @ b
        return added.view(output.shape).to(output.dtype)


class _Rows:
    """Hold the slot of each row: index (rows,), and others (rows, slots) where all slots are multiplied at once."""

    def __init__(self, index: Tensor, slots: int) -> None:
        self.index = index
        few = slots <= MASKED_SLOTS * len(index)
        self.others = index[:, None] != torch.arange(slots, device=index.device) if few else None


class GroupedAdapters:
    """Add the adapter that each row names to the linears of a frozen model, by forward hooks.

    Attributes:
        slots: number of adapters in memory; slot 0 is the base.
        version: number of times that linears were added or moved in memory, which CUDA graphs cannot follow.
    """

    def __init__(self, model: nn.Module, slots: int) -> None:
        self.model, self.slots = model, slots + 1
        self.version = 0
        self._stacks: dict[str, _Stack] = {}
        self._rows: _Rows | None = None

    def put(self, slot: int, weights: Mapping[str, tuple[Tensor, Tensor]], scale: float) -> None:
        """Write A (r, in) and B (out, r) of each module in `weights` into `slot`. Other modules of it are cleared."""
        assert 0 < slot < self.slots, slot
        self.clear(slot)
        for name, (a, b) in weights.items():
            self.version += self._stack_of(name, rank=a.shape[0]).put(slot, a, b, scale)

    def clear(self, slot: int) -> None:
        """Make `slot` answer as the base."""
        for stack in self._stacks.values():
            stack.clear(slot)

    @contextmanager
    def rows(self, index: Tensor) -> Iterator[None]:
        """Let row i of a batch use the adapter in slot `index[i]` within the block; index (rows,) is int64."""
        self._rows = _Rows(index, self.slots)
        try:
            yield
        finally:
            self._rows = None

    def size_bytes(self) -> int:
        """Return the bytes of all slots."""
        return sum(t.nbytes for stack in self._stacks.values() for t in (stack.a, stack.b))

    def _stack_of(self, name: str, rank: int) -> _Stack:
        if name not in self._stacks:
            linear: Any = self.model.get_submodule(name)
            width = 1 << (rank - 1).bit_length()
            like = torch.empty(0, device=linear.weight.device, dtype=self._dtype(linear))
            stack = self._stacks[name] = _Stack(self.slots, width, *linear_size(linear), like)
            linear.register_forward_hook(self._hook(name, stack))
            self.version += 1
        return self._stacks[name]

    def _dtype(self, linear: Any) -> torch.dtype:
        if linear.weight.device.type == "cpu":
            return torch.float32
        # a quantized weight is made of integers
        floats = (getattr(linear, "compute_dtype", None), linear.weight.dtype)
        return next(dtype for dtype in floats if dtype is not None)

    def _hook(self, name: str, stack: _Stack) -> Any:
        def add(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
            rows, x = self._rows, inputs[0]
            if rows is None:
                return output
            if x.ndim != 3 or x.shape[0] != len(rows.index):
                what = f"{name} mixes the rows of a batch, so adapters on it cannot be served together"
                raise AdapterError(what, fix="merge the run, and serve the merged model")
            return stack.add_to(output, x, rows)

        return add


@contextmanager
def plain_adapter(model: nn.Module, weights: Mapping[str, tuple[Tensor, Tensor]], scale: float) -> Iterator[None]:
    """Give `model` one adapter within the block, added as scale · B(A x) in fp32: the reference of a slot."""
    handles = []
    for name, (a, b) in weights.items():
        linear: Any = model.get_submodule(name)
        device = linear.weight.device
        handles.append(linear.register_forward_hook(_adding(a.to(device).float(), b.to(device).float(), scale)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _adding(a: Tensor, b: Tensor, scale: float) -> Any:
    def add(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        return (output + F.linear(F.linear(inputs[0].float(), a), b) * scale).to(output.dtype)

    return add
