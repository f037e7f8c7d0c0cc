"""Packed micro-batches: rows laid one after another, and where each begins and ends."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lorafit.errors import TrainingError

MAX_PADDED = 1.25  # a group of rows is padded to its longest while that costs at most a quarter more tokens


@dataclass(frozen=True, slots=True)
class Group:
    """Rows of similar length, laid side by side: token indices (rows, longest) into the packed axis.

    Short rows are padded on the right with their own first token. Under causal attention no real token sees
    a later one, and padded outputs are never read, so the padding is inert.
    """

    tokens: torch.Tensor


@dataclass(frozen=True, slots=True)
class Segments:
    """The rows of one micro-batch, as tensors only, so that compiled code need not be made anew for each micro-batch.

    `cu_seqlens` (rows + 1,) int32 as variable-length kernels want them; `gather` (padded tokens,) the groups' token
    indices, one group after another; `scatter` (tokens,) for each packed token its place in `gather`; `layout`
    (2 × groups,) int64: each group's rows and their width, by falling width; on a GPU, only what `on_host` knows it
    by. Where a graph fixes all but `cu_seqlens`, `layout` is the most rows and their largest width, then
    an empty group, and `gather` and `scatter` mean nothing.
    """

    cu_seqlens: torch.Tensor
    gather: torch.Tensor
    scatter: torch.Tensor
    layout: torch.Tensor

    @classmethod
    def of_lengths(cls, lengths: Sequence[int]) -> Segments:
        """Segments of rows that lie one after another, `lengths[i]` tokens each."""
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
        """Tokens of the longest row."""
        return int(on_host(self.layout)[1])

    @property
    def groups(self) -> tuple[Group, ...]:
        """The groups, longest rows first."""
        return groups_of(self.gather, self.layout)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Segments:
        """The same segments with their tensors on `device`."""

        def moved(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(device, non_blocking=non_blocking)

        layout = layout_on(device, self.layout)
        return Segments(moved(self.cu_seqlens), moved(self.gather), moved(self.scatter), layout)


def layout_on(device: torch.device | str, layout: torch.Tensor) -> torch.Tensor:
    """`layout` for operators that run on `device`: where that is a GPU, an empty tensor there that stands for it.

    One input on the CPU would have the compiler take an operator's outputs for unaligned, and what reads them for
    unable to load 16 bytes at a time (`backbone/kernels/frozen_linear_op.py` has more).
    """
    host = on_host(layout)
    if torch.device(device).type != "cuda":
        return host
    stand_in = torch.empty_like(host, device=device)
    _ON_HOST[stand_in.data_ptr()] = host
    return stand_in


def on_host(layout: torch.Tensor) -> torch.Tensor:
    """The layout (2 × groups,) that can be read without waiting for a GPU."""
    if not layout.is_cuda:
        return layout
    host = _ON_HOST.get(layout.data_ptr())
    assert host is not None and host.numel() == layout.numel(), "a copy of what stands for a layout stands for none"
    return host


_ON_HOST: dict[int, torch.Tensor] = {}
"""Layouts by the address of what stands for them on a GPU. Addresses come round again, so this stays small; what lies
at one of them now was entered last."""


def groups_of(gather: torch.Tensor, layout: torch.Tensor) -> tuple[Group, ...]:
    """The groups that `gather` and `layout` describe."""
    groups, start = [], 0
    for rows, width in on_host(layout).view(-1, 2).tolist():
        groups.append(Group(gather[start : start + rows * width].view(rows, width)))
        start += rows * width
    return tuple(groups)


def _similar(lengths: np.ndarray) -> list[np.ndarray]:
    """Row indices in groups whose padding stays within MAX_PADDED, each group longest row first."""
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
    """Rows one after another on one axis, positions restarting at each row.

    ids (1, tokens) int64; positions (1, tokens) int64; `predictors` (n,) int64 are the tokens whose successor is
    supervised, and `targets` (n,) int64 those successors.
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
        """The same micro-batch on `device`. Raises TrainingError for a subclass, whose further fields would be lost."""
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


def collate(rows: Iterable[tuple[np.ndarray, np.ndarray]]) -> MicroBatch:
    """Pack (ids (tokens,), mask (tokens,)) rows into one micro-batch.

    A row's first token can never be supervised (nothing precedes it); its mask there is ignored.
    """
    pairs = list(rows)
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


@dataclass(frozen=True, slots=True)
class Step:
    """All micro-batches of one optimizer step, and what the loss is divided by: the step's supervised tokens."""

    micro_batches: Sequence[MicroBatch]
    supervised: int
    tokens: int
    rows: tuple[int, ...] = ()
