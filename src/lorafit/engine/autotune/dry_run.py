"""Dry run: the memory policy solved with this GPU's figures, and tried before the first step.

The largest micro-batch runs forward and backward within the budget until its memory no longer grows. A run that
cannot finish then stops at once, not at hour three.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import Tensor

from lorafit.config.memory_policy import MemoryPolicy
from lorafit.engine.autotune.problem import (
    HOST_SHARE,
    SLACK_BYTES,
    Problem,
    Workload,
    does_not_fit,
    measured_problem,
    smallest_policy,
)
from lorafit.engine.cuda_graphs import Graphs
from lorafit.engine.layers.decoder import DecoderLayers
from lorafit.engine.layers.host_embeddings import HostEmbedding, keep_embeddings_on_host
from lorafit.engine.packing import MicroBatch
from lorafit.engine.runtime import allocator_retries, release_memory
from lorafit.hardware.detect import available_bytes

MIN_STREAMS = {"whole": 1, "feed_forward": 4, "keep": 8}
"""Bytes saved by a layer at each level, in widths of its residual stream.

The figures are those of families that save little.
"""
SOLVED_TRIES = 6
MAX_PASSES = 5
"""Most forward and backward passes of one micro-batch until the allocator is at rest."""
REST_SHARE = 0.25
"""Share of the unused budget by which the last pass may grow the reserved memory.

Growth slows down from pass to pass.
"""
UNUSED_SHARE, GROWING_TRIES = 0.10, 3
"""Share of the budget that a shrunk policy may leave unused, and tries with more memory."""
STEP_SHARE = 0.04
"""Share of the budget that the first misfit takes away at most.

Each next misfit may take twice that.
"""


@dataclass(frozen=True, slots=True)
class Attempt:
    """Hold the memory and time of one tried policy.

    Attributes:
        policy: The policy, as text.
        room_bytes: The device memory that it was solved for; 0 if it was not solved.
        peak_bytes: Peak of reserved memory.
        allocated_bytes: Peak of allocated memory.
        graph_bytes: Memory of the largest micro-batch that is recorded.
        retries: Number of the allocator's retries in each pass.
        elapsed_s: Seconds.
        fits: Whether the peak was within the budget, and the last pass of each micro-batch needed no retry.
    """

    policy: str
    room_bytes: int
    peak_bytes: int
    allocated_bytes: int
    graph_bytes: int
    retries: tuple[int, ...]
    elapsed_s: float
    fits: bool


@dataclass(frozen=True, slots=True)
class DryRun:
    """Hold the policy that fits, and the attempts that found it.

    Attributes:
        policy: The policy.
        schedule: The schedule of its offload.
        peak_bytes: Peak of reserved memory.
        budget_bytes: Budget of the peak.
        graph_bytes: Memory of the largest micro-batch that is recorded.
        compile_s: Seconds of compiling, forward alone; part of the other times.
        measure_s: Seconds of measuring.
        elapsed_s: Seconds in total.
        attempts: Every attempt.
    """

    policy: MemoryPolicy
    schedule: tuple[int, ...]
    peak_bytes: int
    budget_bytes: int
    graph_bytes: int
    compile_s: float
    measure_s: float
    elapsed_s: float
    attempts: tuple[Attempt, ...]


def find_policy(model: Any, layers: DecoderLayers, work: Workload, budget_bytes: int, *, solves: bool) -> DryRun:
    """Set `layers` to a policy that fits `budget_bytes`, and prove it by a dry run.

    With `solves` it is the fastest such policy. A policy that needs more than predicted is solved again for that much
    less memory, or made smaller. A policy that was made too small is solved again for the memory it leaves.
    Gradients and random states stay as they were. Raises TrainingError if even the smallest policy does not fit.
    """
    started = time.perf_counter()
    with _gc_frozen(), torch.random.fork_rng(devices=[torch.cuda.current_device()]):
        ahead = partial(layers.offload.arena.pin_ahead, _pinned_bytes_ahead(layers, work))
        problem = measured_problem(model, layers, work, budget_bytes, ahead) if solves else None
        measured = time.perf_counter()
        attempts = tuple(Trials(model, layers, work, budget_bytes).attempts(problem))
        layers.offload.arena.trim()
    layers.policy = replace(layers.policy, host_embeddings=isinstance(model.get_input_embeddings(), HostEmbedding))
    return DryRun(
        policy=layers.policy,
        schedule=tuple(layers.offload.schedule),
        peak_bytes=attempts[-1].peak_bytes,
        budget_bytes=budget_bytes,
        graph_bytes=attempts[-1].graph_bytes,
        compile_s=layers.compile_s,
        measure_s=measured - started,
        elapsed_s=time.perf_counter() - started,
        attempts=attempts,
    )


@dataclass(frozen=True)
class Trials:
    """Try memory policies in a model until one fits.

    Attributes:
        model: The model.
        layers: Its decoder layers, which take each policy.
        work: The micro-batches to run.
        budget_bytes: Budget of reserved memory.
    """

    model: Any
    layers: DecoderLayers
    work: Workload
    budget_bytes: int

    def attempts(self, problem: Problem | None) -> Iterator[Attempt]:
        """Yield every attempt; the last one fits, and sets the layers' policy."""
        if problem is not None:
            problem.apply(self.layers)
        failed: int | None = None
        for number in count():
            attempt = self.attempt(problem)
            yield attempt
            if attempt.fits:
                break
            failed = problem.room.device_bytes if problem else None
            if problem is not None and number < SOLVED_TRIES:
                problem = problem.smaller(_missing(attempt, self.budget_bytes, STEP_SHARE * 2**number))
                problem.apply(self.layers)
            elif not self._reduce_memory():
                raise does_not_fit()
        if problem is not None and number <= SOLVED_TRIES:
            yield from self._grown(problem, attempt, failed)

    def _grown(self, problem: Problem, attempt: Attempt, failed_bytes: int | None) -> Iterator[Attempt]:
        """Solve again for the memory that `attempt` left unused; the last attempt yielded fits.

        A prediction keeps a reserve. The smallest policy, taken if none was found, shows its size.
        """
        tried = attempt
        for _ in range(GROWING_TRIES):
            unused = self.budget_bytes - attempt.peak_bytes
            wasted = failed_bytes is not None and unused > UNUSED_SHARE * self.budget_bytes
            roomier = problem.roomier(unused - SLACK_BYTES // 4, failed_bytes)
            if roomier is None or not (wasted or not problem.has_policy):
                break
            roomier.apply(self.layers)
            tried = self.attempt(roomier)
            yield tried
            if tried.fits:
                problem, attempt = roomier, tried
            else:
                failed_bytes = roomier.room.device_bytes
        if tried is not attempt:
            problem.apply(self.layers)
            yield attempt

    def attempt(self, problem: Problem | None) -> Attempt:
        """Run the largest micro-batches under the current policy; each uses the memory that the others left."""
        started, layers = time.perf_counter(), self.layers
        if layers.policy.host_embeddings:
            keep_embeddings_on_host(self.model)
        release_memory()
        torch.cuda.reset_peak_memory_stats()
        passes = self._run_all()
        reserved, allocated = torch.cuda.max_memory_reserved(), torch.cuda.max_memory_allocated()
        # each of the allocator's retries stops the GPU: the policy fits, but crawls
        fits = reserved <= self.budget_bytes and passes.ended and not passes.asked_again
        if passes.grew and problem is not None and layers.policy != smallest_policy(layers, self.work.longest):
            fits = False  # growth may lead there; a policy that the user set is kept, and the run goes on
        passes.state = []
        drop_gradients(self.model)
        layers.offload.begin()
        release_memory()
        return Attempt(
            policy=str(layers.policy),
            room_bytes=problem.room.device_bytes if problem else 0,
            peak_bytes=reserved,
            allocated_bytes=allocated,
            graph_bytes=passes.graph_bytes,
            retries=tuple(passes.retries),
            elapsed_s=time.perf_counter() - started,
            fits=fits,
        )

    def _reduce_memory(self) -> bool:
        """Set the next smaller policy, embeddings and micro-batches included; False if there is none."""
        layers, work = self.layers, self.work
        smaller = layers.policy.next_smaller(len(layers), work.max_length, work.longest)
        if smaller is None:
            return False
        layers.policy = smaller
        layers.set_schedule(())
        return True

    def _run_all(self) -> _Passes:
        """Run the largest micro-batch until its memory is at rest.

        With CUDA graphs the largest recorded micro-batch runs first, so that others run beside the graphs' memory.
        """
        layers, work = self.layers, self.work
        micro_tokens = layers.policy.micro_tokens or work.max_length
        largest, recorded, passes = work.batch_of(micro_tokens), None, _Passes()
        graphs = Graphs(layers, work.longest, [weight for weight in self.model.parameters() if weight.requires_grad])
        if layers.policy.cuda_graph_max_tokens:
            most = min(layers.policy.cuda_graph_max_tokens, largest.tokens)
            recorded = work.within(micro_tokens, most) if graphs.records else None
            layers.policy = replace(layers.policy, cuda_graph_max_tokens=most if recorded is not None else 0)
        try:
            with layers:
                if recorded is not None:
                    before = torch.cuda.memory_allocated()
                    for _ in range(2):
                        passes.run(partial(graphs.run, recorded, _share(recorded), partial(_forward_backward, work)))
                        taken = torch.cuda.max_memory_allocated() - before - graphs.gradient_bytes
                        passes.graph_bytes = graphs.arena_bytes = graphs.arena_bytes or taken
                    passes.asked_again = bool(passes.retries[-1])
                passes.settle(
                    partial(_forward_backward, work, largest, _share(largest)), self.model, work, self.budget_bytes
                )
            passes.ended = True
        except torch.OutOfMemoryError:
            pass
        if graphs.failed:
            layers.policy = replace(layers.policy, cuda_graph_max_tokens=0)
        graphs.forget()
        return passes


@contextlib.contextmanager
def _gc_frozen() -> Iterator[None]:
    """Keep the garbage collector off the existing objects: a model's take it 0.4 s each time.

    A program that keeps objects of its own from it is left alone, since all of them would be released together.
    """
    if gc.get_freeze_count():
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _pinned_bytes_ahead(layers: DecoderLayers, work: Workload) -> int:
    """Return the bytes to pin at once for the planned policy's offload.

    They are at most half of the free memory. Unneeded bytes are given back later.
    """
    policy, config = layers.policy, layers.core.config.get_text_config()
    streams = sum(MIN_STREAMS[policy.level(index)] for index in range(policy.offloaded_layers))
    size = streams * max(policy.micro_tokens or 0, work.max_length) * int(config.hidden_size) * 2
    return min(size, round(available_bytes() * HOST_SHARE))


def _missing(attempt: Attempt, budget_bytes: int, share: float) -> int:
    """Return the bytes to take from the available memory after a misfit.

    They are the missing bytes, but at most this share of the budget.
    """
    lacking = attempt.peak_bytes - budget_bytes
    most = round(share * budget_bytes)
    return (min(lacking, most) if lacking > 0 else most) + SLACK_BYTES // 4


@dataclass(slots=True)
class _Passes:
    """Hold the results of one attempt's passes.

    Attributes:
        retries: Number of the allocator's retries in each pass.
        asked_again: Whether the last pass of a micro-batch had a retry.
        grew: Whether the very last pass still took clearly more than the one before.
        ended: Whether all passes ended.
        graph_bytes: Memory of the largest micro-batch that is recorded.
        state: Tensors in the place of the optimizer's state.
    """

    retries: list[int] = field(default_factory=list)
    asked_again: bool = False
    grew: bool = False
    ended: bool = False
    graph_bytes: int = 0
    state: list[Tensor] = field(default_factory=list)

    def run(self, forward_backward: Callable[[], object]) -> None:
        before = allocator_retries()
        forward_backward()
        torch.cuda.synchronize()
        self.retries.append(allocator_retries() - before)

    def settle(self, forward_backward: Callable[[], object], model: Any, work: Workload, budget_bytes: int) -> None:
        """Run until a pass takes hardly more than the one before.

        Each pass starts with the memory of the last one. The first pass leaves gradients, and the optimizer's state is
        then allocated, so the second pass has less memory.
        """
        self.run(forward_backward)
        self.state = _optimizer_state(model, work)
        for _ in range(MAX_PASSES - 1):
            if not self.graph_bytes:  # graphs add to gradients that stay in place
                drop_gradients(model)
            before = torch.cuda.memory_reserved()
            self.run(forward_backward)
            now = torch.cuda.memory_reserved()
            if now > budget_bytes:
                return
            self.grew = now - before > REST_SHARE * (budget_bytes - now)
            if not self.retries[-1] and not self.grew:
                return
        self.asked_again = self.asked_again or bool(self.retries[-1])


def drop_gradients(model: Any) -> None:
    """Free the gradients of all weights."""
    for weight in model.parameters():
        weight.grad = None


def _optimizer_state(model: Any, work: Workload) -> list[Tensor]:
    """Allocate two tensors for each trained weight, as large as the optimizer's state.

    Gradients exist already, and are not counted.
    """
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    gradient_bytes = sum(weight.numel() * weight.element_size() for weight in trained)
    share = max(0, work.coming_bytes - gradient_bytes) / max(1, sum(weight.numel() for weight in trained))
    sizes = [round(weight.numel() * share / 2) for weight in trained for _ in range(2)]
    return [torch.empty(size, dtype=torch.uint8, device="cuda") for size in sizes]


def _share(batch: MicroBatch) -> float:
    return 1 / max(batch.supervised, 1)


def _forward_backward(work: Workload, batch: MicroBatch, share: Tensor | float) -> Tensor:
    loss = work.loss_of(batch, share)
    loss.backward()
    return loss.detach()
