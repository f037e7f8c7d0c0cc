"""MicroBatch: packed rows as tensors. A step is a set of examples; how they are packed is only layout."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lorafit.engine.segments import Segments


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
        """The same micro-batch on `device`."""
        return MicroBatch(
            ids=self.ids.to(device, non_blocking=non_blocking),
            positions=self.positions.to(device, non_blocking=non_blocking),
            predictors=self.predictors.to(device, non_blocking=non_blocking),
            targets=self.targets.to(device, non_blocking=non_blocking),
            segments=self.segments.to(device, non_blocking),
        )


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
