"""Packing: micro-batches of rows laid one after another, with their row boundaries."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lorafit.errors import TrainingError

MAX_PADDED = 1.25  # a group of rows is padded to its longest while that costs at most a quarter more tokens


@dataclass(frozen=True, slots=True)
class Group:
    """Hold rows of similar length side by side: token indices (rows, longest) into the packed axis.

    Short rows are padded on the right with their own first token. Under causal attention no real token sees
    a later one, and padded outputs are never read, so the padding is inert.
    """

    tokens: torch.Tensor


@dataclass(frozen=True, slots=True)
class Segments:
    """Hold the row boundaries of one micro-batch, as tensors only.

    Compiled code is then not compiled anew for each micro-batch. In a CUDA graph only `cu_seqlens` changes: `layout` is
    then the most rows and their largest width, then an empty group, and `gather` and `scatter` mean nothing.

    Attributes:
        cu_seqlens: (rows + 1,) int32, as variable-length kernels take it.
        gather: (padded tokens,) the groups' token indices, one group after another.
        scatter: (tokens,) the place in `gather` of each packed token.
        layout: (2 × groups,) int64, each group's rows and their width, by falling width. On a GPU it is a stand-in for
            the tensor that `on_host` returns.
    """

    cu_seqlens: torch.Tensor
    gather: torch.Tensor
    scatter: torch.Tensor
    layout: torch.Tensor

    @classmethod
    def of_lengths(cls, lengths: Sequence[int]) -> Segments:
        """Return the segments of rows that lie one after another, `lengths[i]` tokens each."""
        sizes = np.asarray(lengths, dtype=np.int64)
        starts = np.concatenate([[0], np.cumsum(sizes)])
        gather, layout = [], []
        scatter = np.empty(starts[-1], dtype=np.int64)
        filled = 0
        for members in _similar(sizes):
            width = int(sizes[members[0]])
            places = np.arange(width)
            inside = places[None] < sizes[members][:, None]
            tokens = np.where(inside, starts[members][:, None] + places[None], starts[members][:, None])
            scatter[tokens[inside]] = filled + np.flatnonzero(inside)
            gather.append(tokens.ravel())
            layout += [len(members), width]
            filled += tokens.size
        return cls(
            torch.from_numpy(starts.astype(np.int32)),
            torch.from_numpy(np.concatenate(gather)),
            torch.from_numpy(scatter),
            torch.tensor(layout),
        )

    @property
    def longest(self) -> int:
        """Return the number of tokens of the longest row."""
        return int(on_host(self.layout)[1])

    @property
    def groups(self) -> tuple[Group, ...]:
        """Return the groups, longest rows first."""
        return groups_of(self.gather, self.layout)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Segments:
        """Return the same segments with their tensors on `device`."""

        def moved(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(device, non_blocking=non_blocking)

        layout = layout_on(device, self.layout)
        return Segments(moved(self.cu_seqlens), moved(self.gather), moved(self.scatter), layout)


def layout_on(device: torch.device | str, layout: torch.Tensor) -> torch.Tensor:
    """Return `layout` for operators that run on `device`; on a GPU, an empty stand-in tensor.

    With one input on the CPU the compiler would treat an operator's outputs as unaligned, and their readers would not
    load 16 bytes at a time (see `backbone/kernels/frozen_linear_op.py`).
    """
    host = on_host(layout)
    if torch.device(device).type != "cuda":
        return host
    stand_in = torch.empty_like(host, device=device)
    _ON_HOST[stand_in.data_ptr()] = host
    return stand_in


def on_host(layout: torch.Tensor) -> torch.Tensor:
    """Return the layout (2 × groups,) on the CPU, without waiting for a GPU."""
    if not layout.is_cuda:
        return layout
    host = _ON_HOST.get(layout.data_ptr())
    assert host is not None and host.numel() == layout.numel(), (
        "no layout is registered at this address: a copy of a stand-in has none"
    )
    return host


_ON_HOST: dict[int, torch.Tensor] = {}
"""Layouts by the address of their stand-ins on a GPU.

Addresses are reused, so the dictionary stays small, and the last entry at an address is the current one.
"""


def groups_of(gather: torch.Tensor, layout: torch.Tensor) -> tuple[Group, ...]:
    """Return the groups that `gather` and `layout` describe."""
    groups, start = [], 0
    for rows, width in on_host(layout).view(-1, 2).tolist():
        groups.append(Group(gather[start : start + rows * width].view(rows, width)))
        start += rows * width
    return tuple(groups)


def _similar(lengths: np.ndarray) -> list[np.ndarray]:
    """Return row indices in groups whose padding stays within MAX_PADDED, each group longest row first."""
    groups: list[list[int]] = []
    tokens = 0
    for row in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[row])
        if groups:
            width = int(lengths[groups[-1][0]])
            if width * (len(groups[-1]) + 1) <= MAX_PADDED * (tokens + length):
                groups[-1].append(row)
                tokens += length
                continue
        groups.append([row])
        tokens = length
    return [np.array(group) for group in groups]


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Hold packed rows on one axis; positions restart at each row.

    Attributes:
        ids: (1, tokens) int64.
        positions: (1, tokens) int64.
        predictors: (n,) int64, the tokens whose successor is supervised.
        targets: (n,) int64, those successors.
        segments: The row boundaries.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    predictors: torch.Tensor
    targets: torch.Tensor
    segments: Segments

    @property
    def tokens(self) -> int:
        return self.ids.shape[1]

    @property
    def supervised(self) -> int:
        return self.targets.shape[0]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> MicroBatch:
        """Return the same micro-batch on `device`. Raises TrainingError for a subclass, whose fields would be lost."""
        require_plain(self, "MicroBatch.to")
        return MicroBatch(
            ids=self.ids.to(device, non_blocking=non_blocking),
            positions=self.positions.to(device, non_blocking=non_blocking),
            predictors=self.predictors.to(device, non_blocking=non_blocking),
            targets=self.targets.to(device, non_blocking=non_blocking),
            segments=self.segments.to(device, non_blocking),
        )


def require_plain(batch: MicroBatch, what: str) -> None:
    """Raise TrainingError where `batch` may have fields that `what` does not carry."""
    if type(batch) is not MicroBatch:
        name = type(batch).__name__
        fix = "keep to the fields of MicroBatch, or carry further ones yourself"
        raise TrainingError(f"{what} carries the fields of MicroBatch alone, and {name} may have more", fix=fix)


def collate(rows: Iterable[tuple[np.ndarray, np.ndarray]], *, padded: bool = False) -> MicroBatch:
    """Pack (ids (tokens,), mask (tokens,)) rows into one micro-batch.

    A row's first token can never be supervised, since no token precedes it; its mask value is ignored. With `padded`
    each row is filled up on the right to the longest, with its own first token and without supervision.
    """
    pairs = list(rows)
    if padded:
        width = max(len(ids) for ids, _ in pairs)
        pairs = [(_filled(ids, width, ids[0]), _filled(mask, width, False)) for ids, mask in pairs]
    lengths = [len(ids) for ids, _ in pairs]
    ids = np.concatenate([ids for ids, _ in pairs]).astype(np.int64)
    mask = np.concatenate([mask for _, mask in pairs]).astype(bool)
    mask[np.cumsum([0, *lengths[:-1]])] = False
    supervised = np.flatnonzero(mask)
    return MicroBatch(
        ids=torch.from_numpy(ids)[None],
        positions=torch.from_numpy(np.concatenate([np.arange(length) for length in lengths]))[None],
        predictors=torch.from_numpy(supervised - 1),
        targets=torch.from_numpy(ids[supervised]),
        segments=Segments.of_lengths(lengths),
    )


def _filled(values: np.ndarray, width: int, value: int | bool) -> np.ndarray:
    return np.concatenate([values, np.full(width - len(values), value, dtype=values.dtype)])


def side_by_side(batch: MicroBatch) -> torch.Tensor:
    """Return the ids (rows, width) of a padded micro-batch. Rows of several widths are a fault of the caller."""
    layout = on_host(batch.segments.layout).tolist()
    assert len(layout) == 2 and layout[0] * layout[1] == batch.tokens, (
        "a forward of several rows needs packed attention, or rows of one width"
    )
    return batch.ids.view(layout)


@dataclass(frozen=True, slots=True)
class Step:
    """Hold one optimizer step.

    Attributes:
        micro_batches: All micro-batches of the step.
        supervised: Weight of the step, by which the loss is divided; for SFT its supervised tokens.
        tokens: Tokens of the step.
        rows: Indices of the step's rows.
        idle: Micro-batches at the end that add nothing, so that all processes run as many.
    """

    micro_batches: Sequence[MicroBatch]
    supervised: float
    tokens: int
    rows: tuple[int, ...] = ()
    idle: int = 0
