"""MemoryRetry: a step that did not fit the memory is run again in smaller micro-batches, then with more recompute.

The examples and the divisor of the loss stay the same, so the step's gradient does too (up to rounding; with dropout
the masks are drawn over another layout, so the bits differ).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

import numpy as np
import torch

from lorafit.config.dial import Dial
from lorafit.data import Rows
from lorafit.engine import MicroBatch, Step, release_memory
from lorafit.errors import TrainingError
from lorafit.findings import Finding, Severity
from lorafit.training.events import EventLog
from lorafit.training.layout import Layout
from lorafit.training.random_streams import RandomStreams
from lorafit.training.steps import StepDataset, pack_rows

# what libraries below torch say instead of raising torch.OutOfMemoryError
SAID_OTHERWISE = (
    "CUDA out of memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
)
Forward = Callable[[MicroBatch, bool], torch.Tensor]
T = TypeVar("T")


class Layers(Protocol):
    """The engine's decoder layers, as far as this file needs them."""

    dial: Dial

    def tighten(self) -> bool:
        """Recompute more than before; False when everything is recomputed already."""

    def relieve(self) -> bool:
        """Take a little less memory; False when everything is recomputed already."""


@dataclass(frozen=True, slots=True)
class OutOfMemory:
    """What an allocation that failed said."""

    words: str


class MemoryRetry:
    """Runs micro-batches; what did not fit is laid out smaller, and stays so for the rest of the run."""

    def __init__(self, steps: StepDataset, events: EventLog, device: torch.device) -> None:
        self.steps, self.events, self.device = steps, events, device
        self.layers: Layers | None = None
        self.give_back: Callable[[], bool] = lambda: False  # memory of steps that evaluation and saving can do without
        self.times, self.tightened = 0, 0

    def run(self, number: int, step: Step, forward: Forward, undo: Callable[[], object]) -> torch.Tensor:
        """The sum of `forward(micro_batch, is_last)` over step `number`; `undo` takes back what a failed try left.

        Raises TrainingError, naming the row, when a single example does not fit.
        """
        before = RandomStreams.now(self.device)
        if any(batch.tokens > self.steps.layout.micro_tokens and row_count(batch) > 1 for batch in step.micro_batches):
            step = self.steps.step_of(step.rows)  # it was laid out before the limit fell
        while isinstance(outcome := self._whole(step, forward), _Failed):
            undo()
            release_memory()
            self._make_room(number, step, outcome)
            step = self.steps.step_of(step.rows)
            before.restore(self.device)
        return outcome

    def evaluate(self, number: int, rows: Rows, forward: Callable[[MicroBatch], torch.Tensor]) -> torch.Tensor:
        """The sum of `forward(micro_batch)` over all of `rows`; a micro-batch that does not fit is halved."""
        total = torch.zeros((), device=self.device)
        # on a card steps may run in micro-batches far larger than `max_tokens`; what is not rehearsed does not
        layout = Layout(min(self.steps.layout.micro_tokens, self.steps.config.max_tokens))
        waiting = layout.of(rows.lengths, np.arange(len(rows)))[::-1]
        while waiting:
            members = waiting.pop()
            outcome = self._once(lambda members=members: forward(pack_rows(rows, members)))  # type: ignore[misc]
            if not isinstance(outcome, OutOfMemory):
                total += outcome
                continue
            release_memory()
            if self.give_back():
                self._note(number, outcome, "evaluating; the memory of CUDA graphs is given back")
                waiting.append(members)
            elif len(members) > 1:
                half = (len(members) + 1) // 2
                self._note(number, outcome, f"evaluating {len(members)} rows at once; they are halved")
                waiting += [members[half:], members[:half]]
            elif self._tighten(number, outcome):
                waiting.append(members)
            else:
                raise _too_large(rows, int(members[0]), "evaluation")
        return total

    def save(self, number: int, write: Callable[[], object]) -> None:
        """Run `write`; when the memory runs out in it, once more after everything unused is given back."""
        outcome = self._once(write)
        if isinstance(outcome, OutOfMemory):
            release_memory()
            self.give_back()
            self._note(number, outcome, "saving; it is tried once more")
            write()

    def finding(self) -> Finding | None:
        """What to set next time, where the memory ran out at all."""
        if not self.times:
            return None
        dial = replace(self.layers.dial if self.layers else Dial(), micro_tokens=self.steps.layout.micro_tokens)
        return Finding(
            "R001",
            Severity.WARNING,
            f"the memory ran out {self.times} times; the run went on in a smaller layout",
            where="events.jsonl",
            why="each time costs the step that is done again",
            fix=f"next time set activations: {dial}",
        )

    def _whole(self, step: Step, forward: Forward) -> torch.Tensor | _Failed:
        total = torch.zeros((), device=self.device)
        last = len(step.micro_batches) - 1
        for place, batch in enumerate(step.micro_batches):
            outcome = self._once(lambda batch=batch, place=place: forward(batch, place == last))  # type: ignore[misc]
            if isinstance(outcome, OutOfMemory):
                return _Failed(batch, outcome)
            total += outcome
        return total

    def _once(self, work: Callable[[], T]) -> T | OutOfMemory:
        # nothing of the error outlives this frame, so what its traceback held is free when this returns
        try:
            return work()
        except RuntimeError as error:
            if self.steps.world > 1 or not is_out_of_memory(error):
                raise  # the other processes would wait for this one's gradients
            return OutOfMemory(str(error).partition("\n")[0])

    def _make_room(self, number: int, step: Step, failed: _Failed) -> None:
        layout, batch = self.steps.layout, failed.batch
        dial = self.layers.dial if self.layers is not None else Dial()
        if self.layers is not None and (dial.dense or dial.graphs) and self.layers.tighten():
            kept = f"the weights of {self.layers.dial.dense} layers stay unpacked" if dial.dense else "no CUDA graphs"
            self._note(number, failed.reason, f"a micro-batch of {batch.tokens} tokens; {kept} from here on")
        elif row_count(batch) > 1:
            before, layout.micro_tokens = layout.micro_tokens, min(layout.micro_tokens, batch.tokens) // 2
            self._note(
                number,
                failed.reason,
                f"a micro-batch of {batch.tokens} tokens; the step is done again in micro-batches of at most "
                f"{layout.micro_tokens}",
                micro_tokens_before=before,
            )
        elif not self._tighten(number, failed.reason):
            raise _too_large(self.steps.rows, self._row_of(step, batch), f"step {number}")

    def _tighten(self, number: int, reason: OutOfMemory) -> bool:
        if self.layers is None or not self.layers.tighten():
            return False
        self.tightened += 1
        self._note(number, reason, "a single row; more of each layer is recomputed from here on")
        return True

    def _note(self, number: int, reason: OutOfMemory, during: str, **details: int) -> None:
        self.times += 1
        self.events.record(
            "out_of_memory",
            number,
            f"the memory ran out in step {number} on {during}",
            micro_tokens=self.steps.layout.micro_tokens,
            tightened=self.tightened,
            reason=reason.words,
            **details,
        )

    def _row_of(self, step: Step, batch: MicroBatch) -> int:
        rows = self.steps.rows
        alike = (row for row in step.rows if np.array_equal(rows.ids(row), batch.ids[0].cpu().numpy()))
        return next(alike)


@dataclass(frozen=True, slots=True)
class _Failed:
    batch: MicroBatch
    reason: OutOfMemory


def row_count(batch: MicroBatch) -> int:
    """Rows packed into `batch`."""
    return batch.segments.cu_seqlens.shape[0] - 1


def is_out_of_memory(error: RuntimeError) -> bool:
    """True for torch's own error, and for what cuBLAS, cuDNN and the CPU's allocator say in its place."""
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in SAID_OTHERWISE)


def _too_large(rows: Rows, row: int, during: str) -> TrainingError:
    return TrainingError(
        f"the memory ran out in {during} on a single row of {int(rows.lengths[row])} tokens",
        where=rows.source(row),
        fix="shorten or drop that row (max_tokens with --long drop), lower rank or targets, or use a larger card",
    )
