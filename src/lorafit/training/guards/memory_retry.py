"""memory_retry: retry a step in a smaller layout when memory runs out.

It also lowers the memory use of layers when the allocator retries too often.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from lorafit.config.memory_policy import MemoryPolicy
from lorafit.data import Rows
from lorafit.engine import PACKED, Graphs, MicroBatch, RowMode, Step, allocator_retries, release_memory
from lorafit.errors import TrainingError
from lorafit.findings import Finding, Severity
from lorafit.training.batches import StepDataset
from lorafit.training.checkpoints.snapshot import RandomStreams
from lorafit.training.distributed import Processes
from lorafit.training.logging.run_logs import EventLog
from lorafit.training.schedule import Schedule

IN_A_ROW = 3
"""Consecutive steps with allocator retries before layers use less memory. A step of a new shape may retry once."""
# messages of libraries below torch, which do not raise torch.OutOfMemoryError
OUT_OF_MEMORY_MESSAGES = (
    "CUDA out of memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
)
T = TypeVar("T")


class AllocatorWatch:
    """Reduce the memory of `layers` after IN_A_ROW steps with allocator retries.

    A retry stops the GPU: such a run takes half as long again (10,661 tokens/s for 17,733 at 16 GiB). The counter is
    the host's. `on_change` is called when the layers have changed.
    """

    def __init__(
        self,
        layers: Layers,
        events: EventLog,
        retries: Callable[[], int] = allocator_retries,
        on_change: Callable[[], object] = lambda: None,
    ) -> None:
        self.layers, self.events, self.retries, self.on_change = layers, events, retries, on_change
        self.seen, self.in_a_row = 0, 0

    def begin_step(self) -> None:
        """Count from here, since retries of evaluation and saving do not matter."""
        self.seen = self.retries()

    def end_step(self, step: int) -> None:
        """Reduce the memory if enough steps in a row had retries."""
        self.in_a_row = self.in_a_row + 1 if self.retries() > self.seen else 0
        if self.in_a_row < IN_A_ROW:
            return
        self.in_a_row = 0
        before = self.layers.policy
        if self.layers.reduce_slightly():
            self.events.record(
                "tight_memory",
                step,
                f"{IN_A_ROW} steps in a row waited for free memory; {_describe_change(before, self.layers.policy)}",
                policy=str(self.layers.policy),
            )
            self.on_change()


def _describe_change(before: MemoryPolicy, after: MemoryPolicy) -> str:
    if before.dequantized_layers > after.dequantized_layers:
        return "fewer weights stay dequantized now"
    if before.cuda_graph_max_tokens > after.cuda_graph_max_tokens:
        return "no CUDA graphs are recorded now"
    if (after.recompute_layers, after.recompute_layers + after.recompute_mlp_layers) > (
        before.recompute_layers,
        before.recompute_layers + before.recompute_mlp_layers,
    ):
        return "more is recomputed now"
    if after.offloaded_layers > before.offloaded_layers:
        return f"{after.offloaded_layers} layers are offloaded to the host now, instead of {before.offloaded_layers}"
    return "less stays on the GPU now"


class Layers(Protocol):
    """Describe the engine's decoder layers, as far as this file needs them."""

    policy: MemoryPolicy

    def reduce_memory(self) -> bool:
        """Recompute more than before. Return False if everything is recomputed already."""

    def reduce_slightly(self) -> bool:
        """Use a little less memory. Return False if everything is recomputed already."""


@dataclass(frozen=True, slots=True)
class TunedMemory:
    """Hold the memory use of a run, as it was tuned before the first step.

    Attributes:
        micro_tokens: the most tokens of a micro-batch.
        layers: the decoder layers, which can use less memory; None for transformers' own.
        graphs: runs small micro-batches as CUDA graphs; None without.
        watches_allocator: True if layers use less memory after repeated allocator retries.
        changed: called when the layers' memory policy has changed.
        rows: packed rows, padded rows, or one row a forward.
    """

    micro_tokens: int
    layers: Layers | None = None
    graphs: Graphs | None = None
    watches_allocator: bool = False
    changed: Callable[[], object] = lambda: None
    rows: RowMode = PACKED


@dataclass(frozen=True, slots=True)
class OutOfMemory:
    """Hold the message of a failed allocation.

    Attributes:
        message: the error's first line.
    """

    message: str


class MemoryRetry:
    """Run steps, evaluations and saves, and retry in a smaller layout when memory runs out.

    The smaller layout stays for the rest of the run.
    """

    def __init__(
        self, steps: StepDataset, events: EventLog, device: torch.device, memory: TunedMemory, processes: Processes
    ) -> None:
        self.steps, self.events, self.device, self.processes = steps, events, device, processes
        self.layers, self.graphs = memory.layers, memory.graphs
        self.times, self.tightened = 0, 0

    def run(self, number: int, step: Step, schedule: Schedule, undo: Callable[[], object]) -> torch.Tensor:
        """Return the loss of step `number` over its supervised tokens; gradients are added up.

        `undo` removes what a failed try left. Raises TrainingError with the row's name if a single example does not
        fit.
        """
        before = RandomStreams.now(self.device)
        if self.processes.any(self._is_outgrown(step)):
            step = self.steps.step_of(step.rows)  # packed before the limit fell
        while True:
            loss, failed = self._whole(step, schedule)
            if not self.processes.any(failed is not None):
                return loss
            undo()
            release_memory()
            self.processes.together(partial(self._shrink_layout, number, step, failed))
            self._tell_main(number, failed is not None)
            self.steps.layout.micro_tokens = self.processes.least(self.steps.layout.micro_tokens)
            step = self.steps.step_of(step.rows)
            before.restore(self.device)

    def _tell_main(self, number: int, failed: bool) -> None:
        """Record in process 0 which other processes ran out of memory."""
        if self.processes.world == 1:
            return
        for rank, one in enumerate(self.processes.gathered(failed)):
            if one and rank and self.processes.is_main:
                message = f"the memory ran out in process {rank} in step {number}; all processes do the step again"
                self.events.record("out_of_memory", number, message, rank=rank)
        self.times = self.processes.most(self.times)

    def evaluate(
        self, number: int, rows: Rows, loss_of: Callable[[MicroBatch], torch.Tensor], is_stopped: Callable[[], bool]
    ) -> torch.Tensor | None:
        """Return the sum of `loss_of(micro_batch)` over `rows`, which several processes share.

        It is None once `is_stopped` returns True. A micro-batch that does not fit is halved.
        """
        total = self.processes.together(lambda: self._evaluate_share(number, rows, loss_of, is_stopped))
        return None if total is None else self.processes.total(total)

    def _evaluate_share(
        self, number: int, rows: Rows, loss_of: Callable[[MicroBatch], torch.Tensor], is_stopped: Callable[[], bool]
    ) -> torch.Tensor | None:
        total = torch.zeros((), device=self.device)
        # steps on a GPU may exceed `max_length`, which the dry run has tried; evaluation has no dry run
        now = self.steps.layout
        layout = replace(now, micro_tokens=min(now.micro_tokens, self.steps.config.max_length))
        parts, idle = self.steps.share_of(rows, np.arange(len(rows)), layout)
        waiting = parts[::-1]
        while waiting:
            if is_stopped():
                return None
            members = waiting.pop()
            outcome = self._once(lambda members=members: loss_of(self.steps.objective.collate(rows, members)))  # type: ignore[misc]
            if isinstance(outcome, OutOfMemory):
                release_memory()
                waiting += self._smaller(number, rows, members, outcome)
            elif len(waiting) >= idle:
                total += outcome
        return total

    def save(self, number: int, write: Callable[[], object]) -> None:
        """Run `write`. If memory runs out, free all unused memory and try once more."""
        outcome = self._once(write)
        if isinstance(outcome, OutOfMemory):
            release_memory()
            self._free_graphs()
            self._note(number, outcome, "saving; it is tried once more")
            write()

    def finding(self) -> Finding | None:
        """Return a finding with the next run's setting, None if memory never ran out."""
        if not self.times:
            return None
        policy = replace(
            self.layers.policy if self.layers else MemoryPolicy(), micro_tokens=self.steps.layout.micro_tokens
        )
        return Finding(
            "R001",
            Severity.WARNING,
            f"the memory ran out {self.times} times; the run continued in a smaller layout",
            where="events.jsonl",
            why="each time a step is done again",
            fix=f"next time set memory_policy: {policy}",
        )

    def _whole(self, step: Step, schedule: Schedule) -> tuple[torch.Tensor, _Failed | None]:
        """Return the loss of `step`, and the part for which memory ran out."""
        total = torch.zeros((), device=self.device)
        for part in schedule.parts(step, 1 / step.supervised):
            outcome = self._once(part.run)
            if isinstance(outcome, OutOfMemory):
                return total, _Failed(part.largest, outcome)
            total += outcome
        return total, None

    def _is_outgrown(self, step: Step) -> bool:
        """Return True if `step` was packed before the limit fell.

        Several processes pack a step again after any retry, so that their layouts agree.
        """
        limit = self.steps.layout.micro_tokens
        outgrown = any(batch.tokens > limit and row_count(batch) > 1 for batch in step.micro_batches)
        return outgrown or (self.processes.world > 1 and self.times > 0)

    def _smaller(
        self, number: int, rows: Rows, members: NDArray[np.integer], reason: OutOfMemory
    ) -> list[NDArray[np.integer]]:
        """Return the row sets to evaluate instead of `members`, which did not fit."""
        if self._free_graphs():
            self._note(number, reason, "evaluating; the memory of CUDA graphs is freed")
            return [members]
        if len(members) > 1:
            half = (len(members) + 1) // 2
            self._note(number, reason, f"evaluating {len(members)} rows at once; they are halved")
            return [members[half:], members[:half]]
        if not self._reduce_memory(number, reason):
            raise _too_large(rows, int(members[0]), "evaluation")
        return [members]

    def _free_graphs(self) -> bool:
        """Free the memory of CUDA graphs, which are recorded again later; False without graphs."""
        return self.graphs is not None and self.graphs.give_back()

    def _once(self, work: Callable[[], T]) -> T | OutOfMemory:
        # the error must not outlive this frame, since its traceback holds tensors
        try:
            return work()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            if self.steps.even:  # the others wait within a layer, and cannot start again
                raise torch.OutOfMemoryError(str(error)) from error
            return OutOfMemory(str(error).partition("\n")[0])

    def _shrink_layout(self, number: int, step: Step, failed: _Failed | None) -> None:
        """Let the micro-batch that `failed` fit in the next try; None where another process ran out of memory."""
        if failed is None:
            return
        layout, batch = self.steps.layout, failed.batch
        policy = self.layers.policy if self.layers is not None else MemoryPolicy()
        if (
            self.layers is not None
            and (policy.dequantized_layers or policy.cuda_graph_max_tokens)
            and self.layers.reduce_memory()
        ):
            kept = (
                f"the weights of {self.layers.policy.dequantized_layers} layers stay dequantized"
                if policy.dequantized_layers
                else "no CUDA graphs"
            )
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
        elif not self._reduce_memory(number, failed.reason):
            raise _too_large(self.steps.rows, self._row_of(step, batch), f"step {number}")

    def _reduce_memory(self, number: int, reason: OutOfMemory) -> bool:
        if self.layers is None or not self.layers.reduce_memory():
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
            reason=reason.message,
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
    """Return the number of rows packed into `batch`."""
    return batch.segments.cu_seqlens.shape[0] - 1


def is_out_of_memory(error: RuntimeError) -> bool:
    """Return True for out-of-memory errors of torch, cuBLAS, cuDNN and the CPU allocator."""
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in OUT_OF_MEMORY_MESSAGES)


def too_little_memory(step: int, folder: Path) -> TrainingError:
    """Return the error for memory that ran out outside micro-batches, as in the optimizer."""
    return TrainingError(
        f"the GPU's memory ran out in step {step}",
        where=str(folder),
        fix="set gpu_memory below the GPU's free memory, or start a new run (--restart) with memory_policy=recompute",
    )


def _too_large(rows: Rows, row: int, during: str) -> TrainingError:
    return TrainingError(
        f"the memory ran out in {during} on a single row of {int(rows.lengths[row])} tokens",
        where=rows.source(row),
        fix="shorten or drop that row (max_length with --on-long drop), lower rank or targets, or use a larger GPU",
    )
