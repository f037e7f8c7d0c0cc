"""batches: the micro-batches of each step, prepared in the background."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lorafit.config import RunConfig
from lorafit.data import Rows, epoch_order, pack_step, pad_step, steps_per_epoch
from lorafit.engine import MicroBatch, Step
from lorafit.objectives import Objective, Sft

AHEAD = 2
"""Items that are prepared in advance."""
STEPS_SEEN = 512
"""Steps of the first epoch that are searched for the largest micro-batch. Only lengths are read: milliseconds."""


class Prefetched(Iterator[Any]):
    """Yield the items of `source` in order, prepared by one thread.

    An error in the thread is raised at its item's turn. With `device` on CUDA every tensor of an item is copied into
    pinned memory, so that `.to(non_blocking=True)` returns before the copy is done. Close the iterator if iteration
    ends early.
    """

    def __init__(self, source: Iterator[Any], device: torch.device) -> None:
        self.source, self.device = source, device
        self.made: queue.Queue[Any] = queue.Queue(AHEAD)
        self.closed = threading.Event()
        self.thread = threading.Thread(target=self._fill, name="lorafit-prefetch", daemon=True)
        self.thread.start()

    def __next__(self) -> Any:
        item = self.made.get()
        if isinstance(item, _Failure):
            self.made.put(item)  # a second call raises the same error
            raise item.error
        return item

    def close(self) -> None:
        """End the thread and wait for it."""
        self.closed.set()
        while self.thread.is_alive():
            try:
                self.made.get(timeout=0.01)
            except queue.Empty:
                continue

    def _fill(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        try:
            for item in self.source:
                if not self._put(pinned(item) if self.device.type == "cuda" else item):
                    return
        except BaseException as error:  # noqa: BLE001 (raised in the thread that iterates)
            self._put(_Failure(error))
        else:
            self._put(_Failure(StopIteration()))

    def _put(self, item: Any) -> bool:
        while not self.closed.is_set():
            try:
                self.made.put(item, timeout=0.05)
            except queue.Full:
                continue
            return True
        return False


class _Failure:
    def __init__(self, error: BaseException) -> None:
        self.error = error


def pinned(value: Any) -> Any:
    """Return `value` with every tensor in pinned memory, within dataclasses, lists and tuples too."""
    if isinstance(value, torch.Tensor):
        return value.pin_memory()
    if isinstance(value, list | tuple):
        return type(value)(pinned(part) for part in value)
    if is_dataclass(value) and not isinstance(value, type):
        return type(value)(**{each.name: pinned(getattr(value, each.name)) for each in fields(value)})
    return value


@dataclass(slots=True)
class Layout:
    """Hold the size limit of a micro-batch. The limit does not change what a step learns.

    Attributes:
        micro_tokens: most tokens of a micro-batch, unless a single row is longer. It shrinks when memory runs out.
        padded: True if rows are padded to the longest of their micro-batch, which counts as tokens.
    """

    micro_tokens: int
    padded: bool = False

    def of(self, lengths: NDArray[np.integer], chosen: NDArray[np.integer]) -> list[NDArray[np.integer]]:
        """Return the rows `chosen` as micro-batches of row numbers.

        `lengths` (all rows,) counts tokens. Rows over the limit come first, each alone.
        """
        sizes = lengths[chosen]
        if self.padded:
            return [chosen[members] for members in pad_step(sizes, self.micro_tokens)]
        alone, fitting = chosen[sizes > self.micro_tokens], chosen[sizes <= self.micro_tokens]
        packed = [fitting[members] for members in pack_step(lengths[fitting], self.micro_tokens)]
        return [*(row[None] for row in alone), *packed]

    def tokens_of(self, lengths: NDArray[np.integer], members: NDArray[np.integer]) -> int:
        """Return the tokens of the micro-batch of the rows `members`, padding included."""
        sizes = lengths[members]
        return int(sizes.max() * len(members) if self.padded else sizes.sum())


class StepDataset:
    """Hold the steps of a run. A step has the same examples in every layout and for any number of processes.

    Examples are shuffled by (seed, epoch) and taken `examples_per_step` at a time. Several processes share a step's
    examples by tokens, and each packs its own. With `even` each runs as many micro-batches as the others, since
    sharded layers are gathered by all at the same time.
    """

    def __init__(
        self,
        rows: Rows,
        config: RunConfig,
        layout: Layout | None = None,
        *,
        objective: Objective | None = None,
        rank: int = 0,
        world: int = 1,
        even: bool = False,
    ) -> None:
        self.rows, self.config, self.rank, self.world, self.even = rows, config, rank, world, even
        self.objective: Objective = objective or Sft()
        self.layout = layout or Layout(config.max_length)

    def __len__(self) -> int:
        """Return the number of steps in an epoch."""
        return steps_per_epoch(len(self.rows), self.config.examples_per_step)

    def __getitem__(self, index: int) -> Step:
        """Return a step of the first epoch."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        return next(self.epoch(0, index))

    def epoch(self, number: int, first: int = 0) -> Iterator[Step]:
        """Yield the steps of epoch `number` from its step `first` on.

        A step gets the layout that holds when it is made.
        """
        for chosen in self.rows_of(number)[first:]:
            yield self.step_of(chosen)

    def rows_of(self, epoch: int) -> list[NDArray[np.int64]]:
        """Return the row numbers of each step of `epoch`."""
        order, size = epoch_order(len(self.rows), self.config.seed, epoch), self.config.examples_per_step
        return [order[start : start + size] for start in range(0, len(order), size)]

    def step_of(self, chosen: Sequence[int] | NDArray[np.integer]) -> Step:
        """Return the step over these rows, in the present layout."""
        members = np.asarray(chosen, dtype=np.int64)
        parts, idle = self.share_of(self.rows, members, self.layout)
        return Step(
            micro_batches=[self.objective.collate(self.rows, part) for part in parts],
            supervised=self.objective.weight(self.rows, members),
            tokens=int(self.rows.lengths[members].sum()),
            rows=tuple(int(row) for row in members),
            idle=idle,
        )

    def share_of(
        self, rows: Rows, members: NDArray[np.integer], layout: Layout
    ) -> tuple[list[NDArray[np.integer]], int]:
        """Return this process's micro-batches of the rows `members`, and how many of them, at the end, are idle.

        An idle one is the shortest row once more; all processes count alike, without asking each other.
        """
        shares = dealt(rows.lengths, members, self.world)
        parts = layout.of(rows.lengths, shares[self.rank])
        if not self.even:
            return parts, 0
        most = max(len(layout.of(rows.lengths, share)) for share in shares)
        shortest, idle = members[rows.lengths[members].argmin()][None], most - len(parts)
        return [*parts, *[shortest] * idle], idle


def dealt(lengths: NDArray[np.integer], chosen: NDArray[np.integer], world: int) -> list[NDArray[np.integer]]:
    """Return the rows `chosen` in `world` shares of about equal tokens; `lengths` (all rows,) counts tokens.

    The longest row comes first, each goes to the share with the fewest tokens (Graham's LPT rule), so two shares differ
    by one row at most. A share keeps the order of `chosen`; one share is `chosen` itself.
    """
    if world == 1:
        return [chosen]
    share_of, tokens = np.empty(len(chosen), np.int64), np.zeros(world, np.int64)
    for place in np.argsort(-lengths[chosen].astype(np.int64), kind="stable"):
        share_of[place] = tokens.argmin()
        tokens[share_of[place]] += lengths[chosen[place]]
    return [chosen[share_of == share] for share in range(world)]


@dataclass(frozen=True)
class MicroBatchSearch:
    """Search the micro-batches of a run for the largest, which a dry run tries.

    Searched are the longest row alone, `step`, and the first epoch's steps, in the shares of all processes.

    Attributes:
        rows: the training rows.
        config: the settings.
        objective: the objective, which lays out a micro-batch.
        step: the rows of the largest step, if known.
        world: the number of processes.
        padded: True if rows are padded to the longest of their micro-batch.
    """

    rows: Rows
    config: RunConfig
    objective: Objective = field(default_factory=Sft)
    step: Sequence[int] | NDArray[np.integer] = ()
    world: int = 1
    padded: bool = False

    def largest(self, micro_tokens: int) -> MicroBatch:
        """Return the micro-batch with the most tokens, cut at `micro_tokens`."""
        most, largest = 0, self._longest_row()
        for tokens, members in self._candidates(micro_tokens):
            if tokens > most:
                most, largest = tokens, members
            if most >= micro_tokens:
                break  # the limit is reached
        return self.objective.collate(self.rows, largest)

    def largest_within(self, micro_tokens: int, limit: int) -> MicroBatch | None:
        """Return the largest micro-batch with at most `limit` tokens, cut at `micro_tokens`; None if all have more."""
        most, largest = 0, None
        for tokens, members in self._candidates(micro_tokens):
            if most < tokens <= limit:
                most, largest = tokens, members
        return None if largest is None else self.objective.collate(self.rows, largest)

    def _candidates(self, micro_tokens: int) -> Iterator[tuple[int, NDArray[np.integer]]]:
        """Yield tokens and row numbers of each micro-batch that is searched."""
        lengths, layout = self.rows.lengths, Layout(micro_tokens, self.padded)
        steps = StepDataset(self.rows, self.config).rows_of(0)[:STEPS_SEEN]
        for chosen in (self._longest_row(), np.asarray(self.step, dtype=np.int64), *steps):
            for share in dealt(lengths, chosen, self.world):
                for members in layout.of(lengths, share):
                    yield layout.tokens_of(lengths, members), members

    def _longest_row(self) -> NDArray[np.integer]:
        return np.array([self.rows.lengths.argmax()])
