"""Segments: where the rows of a packed micro-batch begin and end, and how attention walks over them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

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

    `boundaries` (rows + 1,) int32 as variable-length kernels want them; `gather` (padded tokens,) the groups' token
    indices, one group after another; `scatter` (tokens,) for each packed token its place in `gather`; `layout`
    (2 × groups,) int64: each group's rows and their width, by falling width; on a card, only what `on_host` knows it
    by. Where a graph fixes all but `boundaries` (`buckets.py`), `layout` is the most rows and their largest width, then
    an empty group, and `gather` and `scatter` mean nothing.
    """

    boundaries: torch.Tensor
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
        return Segments(moved(self.boundaries), moved(self.gather), moved(self.scatter), layout)


def layout_on(device: torch.device | str, layout: torch.Tensor) -> torch.Tensor:
    """`layout` for operators that run on `device`: where that is a card, an empty tensor there that stands for it.

    One input on the CPU would have the compiler take an operator's outputs for unaligned, and what reads them for
    unable to load 16 bytes at a time (`backbone/weight_ticket.py` has more).
    """
    host = on_host(layout)
    if torch.device(device).type != "cuda":
        return host
    stand_in = torch.empty_like(host, device=device)
    _ON_HOST[stand_in.data_ptr()] = host
    return stand_in


def on_host(layout: torch.Tensor) -> torch.Tensor:
    """The layout (2 × groups,) that can be read without waiting for a card."""
    if not layout.is_cuda:
        return layout
    host = _ON_HOST.get(layout.data_ptr())
    assert host is not None and host.numel() == layout.numel(), "a copy of what stands for a layout stands for none"
    return host


_ON_HOST: dict[int, torch.Tensor] = {}
"""Layouts by the address of what stands for them on a card. Addresses come round again, so this stays small; what lies
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
