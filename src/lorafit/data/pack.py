"""Packing: the order of an epoch, and each step's examples in as few micro-batches as possible.

A step is a set of examples. How they are laid into micro-batches changes nothing that is learnt: rows in one
micro-batch do not see each other, and the loss is normalised over the whole step.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lorafit.data.dedup import mixed
from lorafit.errors import DataError

Rows = NDArray[np.int64]

ROWS_SEEN, EPOCHS_SEEN = 1 << 22, 1024
"""Rows that are shuffled to find a run's largest step, one epoch at least: about a second's worth; and epochs."""


@dataclass(frozen=True)
class Fill:
    """Hold the fill of an epoch's micro-batches: the `share` of token slots in use, and their number."""

    share: float
    micro_batches: int
    steps: int


def epoch_order(count: int, seed: int, epoch: int) -> Rows:
    """Return row numbers (count,) in the order of `epoch`: a shuffle by `seed` and `epoch` alone.

    Sorted by a hash (SplitMix64, Steele et al. 2014) and not drawn by numpy, whose streams may change between
    versions: a run that resumes elsewhere must see the same rows.
    """
    start = mixed(np.array([seed], dtype=np.uint64)) ^ mixed(np.array([epoch], dtype=np.uint64) + np.uint64(1 << 40))
    keys = mixed(np.arange(count, dtype=np.uint64) + start)
    return np.argsort(keys, kind="stable").astype(np.int64)


def pack_step(lengths: Sequence[int] | NDArray[np.integer], max_tokens: int) -> list[list[int]]:
    """Return micro-batches of at most `max_tokens` tokens, as indices into `lengths`, by best-fit decreasing.

    Every index stands in exactly one micro-batch; ties keep their order, so the result is deterministic.
    Raises DataError when a row alone is longer than `max_tokens`.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    if sizes.size == 0:
        return []
    assert int(sizes.min()) >= 0, "a row cannot have a negative length"
    if int(sizes.max()) > max_tokens:
        raise DataError(
            f"a row of {int(sizes.max())} tokens does not fit a micro-batch of {max_tokens}",
            fix="raise max_length, or drop long rows with --on-long drop",
        )
    order = np.argsort(-sizes, kind="stable")
    return _Bins(max_tokens).filled(order.tolist(), sizes[order].tolist())


PADDED_SHARE, PADDED_TOKENS = 0.25, 512
"""Padding of a padded micro-batch: at most a share of its rows' tokens, or a number of tokens that costs less than the
start of another micro-batch."""


def pad_step(lengths: Sequence[int] | NDArray[np.integer], max_tokens: int) -> list[list[int]]:
    """Micro-batches of rows of similar length, as indices into `lengths`, each of at most `max_tokens` with padding.

    Rows come longest first, so that little is padded; ties keep their order. A longer row stands alone.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    batches: list[list[int]] = []
    width = tokens = 0
    for row, size in ((int(row), int(sizes[row])) for row in np.argsort(-sizes, kind="stable")):
        padded = width * (len(batches[-1]) + 1) if batches else 0
        spare = max(PADDED_SHARE * (tokens + size), PADDED_TOKENS)
        if batches and padded <= max_tokens and padded - tokens - size <= spare:
            batches[-1].append(row)
            tokens += size
        else:
            batches.append([row])
            width = tokens = size
    return batches


def padded_share(lengths: NDArray[np.integer], examples_per_step: int, max_tokens: int, seed: int = 0) -> float:
    """Share of the tokens of the first epoch's padded micro-batches that belong to rows; 1 without rows."""
    sizes = np.asarray(lengths, dtype=np.int64)
    order = epoch_order(len(sizes), seed, 0)
    steps = (sizes[order[start : start + examples_per_step]] for start in range(0, len(order), examples_per_step))
    computed = sum(int(step[batch[0]]) * len(batch) for step in steps for batch in pad_step(step, max_tokens))
    return int(sizes.sum()) / computed if computed else 1.0


class _Bins:
    """Open micro-batches, grouped by their free room."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.bins: list[list[int]] = []
        self.by_room: dict[int, list[int]] = {}
        self.rooms: list[int] = []  # sorted keys of by_room

    def filled(self, indices: list[int], sizes: list[int]) -> list[list[int]]:
        """Return the bins after placing `indices`, in descending order of `sizes`."""
        for index, size in zip(indices, sizes):
            place = bisect_left(self.rooms, size)
            if place == len(self.rooms):
                self._store(self._opened(), self.capacity - size, index)
                continue
            room = self.rooms[place]
            waiting = self.by_room[room]
            number = waiting.pop()
            if not waiting:
                del self.by_room[room], self.rooms[place]
            self._store(number, room - size, index)
        return self.bins

    def _opened(self) -> int:
        self.bins.append([])
        return len(self.bins) - 1

    def _store(self, number: int, room: int, index: int) -> None:
        self.bins[number].append(index)
        waiting = self.by_room.get(room)
        if waiting is None:
            self.by_room[room] = [number]
            insort(self.rooms, room)
        else:
            waiting.append(number)


def steps_per_epoch(count: int, examples_per_step: int) -> int:
    """Return the number of optimizer steps for `count` examples. The last may be smaller."""
    return -(-count // examples_per_step)


def steps(
    lengths: NDArray[np.integer], examples_per_step: int, max_tokens: int, seed: int, epoch: int
) -> Iterator[list[Rows]]:
    """Yield the steps of `epoch`: each a list of micro-batches, each an array of row numbers (rows,).

    Over the epoch every row of `lengths` (count,) comes exactly once.
    """
    sizes = np.asarray(lengths)
    order = epoch_order(len(sizes), seed, epoch)
    for start in range(0, len(order), examples_per_step):
        rows = order[start : start + examples_per_step]
        yield [rows[batch] for batch in pack_step(sizes[rows], max_tokens)]


def largest_step(lengths: NDArray[np.integer], examples_per_step: int, seed: int, count: int) -> Rows:
    """Return the row numbers (rows,) of the step with the most tokens.

    Among equals it is the first. It looks at the first `count` steps over rows of `lengths` (all rows,), within
    ROWS_SEEN and EPOCHS_SEEN.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    largest = np.zeros(0, dtype=np.int64)
    an_epoch = steps_per_epoch(len(sizes), examples_per_step)
    epochs = min(-(-count // max(an_epoch, 1)), max(1, ROWS_SEEN // max(len(sizes), 1)), EPOCHS_SEEN)
    for epoch in range(epochs if an_epoch > 1 else min(epochs, 1)):
        order = epoch_order(len(sizes), seed, epoch)[: (count - epoch * an_epoch) * examples_per_step]
        starts = np.arange(0, len(order), examples_per_step)
        tokens = np.add.reduceat(sizes[order], starts) if len(order) else np.zeros(1)
        start = int(tokens.argmax()) * examples_per_step
        if tokens.max() > sizes[largest].sum():
            largest = order[start : start + examples_per_step]
    return largest


def packed_fill(lengths: NDArray[np.integer], examples_per_step: int, max_tokens: int, seed: int = 0) -> Fill:
    """Return the fill of the first epoch's micro-batches."""
    sizes = np.asarray(lengths, dtype=np.int64)
    order = epoch_order(len(sizes), seed, 0)
    count = steps_per_epoch(len(sizes), examples_per_step)
    micro_batches = sum(
        len(pack_step(sizes[order[start : start + examples_per_step]], max_tokens))
        for start in range(0, len(order), examples_per_step)
    )
    slots = micro_batches * max_tokens
    return Fill(int(sizes.sum()) / slots if slots else 0.0, micro_batches, count)
