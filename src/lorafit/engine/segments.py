"""Segments: where the rows of a packed micro-batch begin and end, and how attention walks over them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

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
    """The rows of one micro-batch: `boundaries` (rows + 1,) int32 as variable-length kernels want them."""

    longest: int
    boundaries: torch.Tensor
    groups: tuple[Group, ...]
    scatter: torch.Tensor  # (tokens,) for each packed token, its place in the concatenated, flattened groups

    @classmethod
    def of_lengths(cls, lengths: Sequence[int]) -> Segments:
        """Segments of rows that lie one after another, `lengths[i]` tokens each."""
        starts = [0, *accumulate(lengths)]
        scatter = torch.empty(starts[-1], dtype=torch.int64)
        groups, filled = [], 0
        for members in _similar(lengths):
            width = lengths[members[0]]
            rows = []
            for place, row in enumerate(members):
                start, length = starts[row], lengths[row]
                rows.append([*range(start, start + length), *([start] * (width - length))])
                at = filled + place * width
                scatter[start : start + length] = torch.arange(at, at + length)
            groups.append(Group(torch.tensor(rows)))
            filled += width * len(members)
        return cls(max(lengths), torch.tensor(starts, dtype=torch.int32), tuple(groups), scatter)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Segments:
        """The same segments with their tensors on `device`."""

        def moved(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(device, non_blocking=non_blocking)

        groups = tuple(Group(moved(group.tokens)) for group in self.groups)
        return Segments(self.longest, moved(self.boundaries), groups, moved(self.scatter))


def _similar(lengths: Sequence[int]) -> list[list[int]]:
    """Row indices in groups whose padding stays within MAX_PADDED, each group longest row first."""
    groups: list[list[int]] = []
    tokens = 0
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if groups:
            width = lengths[groups[-1][0]]
            if width * (len(groups[-1]) + 1) <= MAX_PADDED * (tokens + lengths[row]):
                groups[-1].append(row)
                tokens += lengths[row]
                continue
        groups.append([row])
        tokens = lengths[row]
    return groups
