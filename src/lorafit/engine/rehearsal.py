"""The rehearsal: before the first step, the dial is solved with this card's own figures and the largest micro-batch is
run until it takes no more than before, forward and backward, within the budget. What could not finish shows here, not
at hour three."""

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

from lorafit.config.dial import Dial
from lorafit.engine.allocator import allocator_retries, release_memory
from lorafit.engine.cuda_graphs import Graphs
from lorafit.engine.dial_problem import HOST_SHARE, SLACK_BYTES, DialProblem, Work, does_not_fit, pose, tightest_dial
from lorafit.engine.layers.decoder import DecoderLayers
from lorafit.engine.layers.host_embeddings import HostEmbedding, keep_embeddings_on_host
from lorafit.engine.packing import MicroBatch
from lorafit.planning.detect import available_bytes

LEAST_STREAMS = {"whole": 1, "feed_forward": 4, "keep": 8}
"""What a layer saves of each level, in widths of its residual stream, and in families that save little."""
SOLVED_TRIES = 6
MOST_PASSES = 5
"""Of one micro-batch, forward and backward, until the allocator has come to rest."""
REST_SHARE = 0.25
"""Of what is left of the budget: what a pass may add to the reserved memory when it is the last. Growth slows down."""
STEP_SHARE = 0.04
"""Of the budget: the most that the first solving after a misfit takes away; the next takes twice that, and so on."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """One rehearsed dial, the room it was solved for (0: it was not), the peak it took of reserved and of allocated
    memory, what the largest micro-batch took that is recorded, how often the allocator had to give back and ask again
    in each pass, and seconds; `fits` says whether that was within the budget, and each micro-batch, the last time,
    without asking again."""

    dial: str
    room_bytes: int
    peak_bytes: int
    allocated_bytes: int
    graph_bytes: int
    retries: tuple[int, ...]
    elapsed_s: float
    fits: bool


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """How it went: the dial that fits and its offload schedule, the peak it took of the budget, what a micro-batch took
    of that which may be recorded, the seconds of compiling (forward alone; part of the others), of measuring and of
    all, and every attempt."""

    dial: Dial
    schedule: tuple[int, ...]
    peak_bytes: int
    budget_bytes: int
    graph_bytes: int
    compile_s: float
    measure_s: float
    elapsed_s: float
    attempts: tuple[Attempt, ...]


def rehearse(model: Any, layers: DecoderLayers, work: Work, budget_bytes: int, *, solves: bool) -> Rehearsal:
    """Turn `layers` to the fastest dial that fits `budget_bytes` (when `solves`), and prove it on the largest
    micro-batch. When that needs more than was reckoned, the dial is solved again for that much less room, or turned
    tighter. Leaves gradients and random states as they were.

    Raises TrainingError when even the tightest setting does not fit.
    """
    started = time.perf_counter()
    with _young_garbage(), torch.random.fork_rng(devices=[torch.cuda.current_device()]):
        ahead = partial(layers.offload.arena.pin_ahead, _pinned_bytes_ahead(layers, work))
        problem = pose(model, layers, work, budget_bytes, ahead) if solves else None
        measured = time.perf_counter()
        attempts = tuple(_attempts(model, layers, work, budget_bytes, problem))
        layers.offload.arena.trim()
    layers.dial = replace(layers.dial, host_embeddings=isinstance(model.get_input_embeddings(), HostEmbedding))
    return Rehearsal(
        dial=layers.dial,
        schedule=tuple(layers.offload.schedule),
        peak_bytes=attempts[-1].peak_bytes,
        budget_bytes=budget_bytes,
        graph_bytes=attempts[-1].graph_bytes,
        compile_s=layers.compile_s,
        measure_s=measured - started,
        elapsed_s=time.perf_counter() - started,
        attempts=attempts,
    )


def _attempts(
    model: Any, layers: DecoderLayers, work: Work, budget_bytes: int, problem: DialProblem | None
) -> Iterator[Attempt]:
    """Every attempt; the last one fits, and `layers` are as in it."""
    if problem is not None:
        problem.turn(layers)
    failed: int | None = None
    for number in count():
        attempt = _attempt(model, layers, work, budget_bytes, problem)
        yield attempt
        if attempt.fits:
            break
        failed = problem.room.device_bytes if problem else None
        if problem is not None and number < SOLVED_TRIES:
            problem = problem.less(_missing(attempt, budget_bytes, STEP_SHARE * 2**number))
            problem.turn(layers)
        elif not _tighten(layers, work):
            raise does_not_fit()
    # the room is reckoned with something to spare: where that left no dial, the tightest shows how much there is
    spare = budget_bytes - attempt.peak_bytes - SLACK_BYTES // 4
    roomier = problem.after_tightest(spare, failed) if problem else None
    if roomier is None:
        return
    roomier.turn(layers)
    faster = _attempt(model, layers, work, budget_bytes, roomier)
    yield faster
    if not faster.fits:
        layers.dial = tightest_dial(layers, work.longest)
        layers.follow(())
        yield attempt


@contextlib.contextmanager
def _young_garbage() -> Iterator[None]:
    """Within it the collector passes over what was there before: a model's objects take it 0.4 s each time."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _pinned_bytes_ahead(layers: DecoderLayers, work: Work) -> int:
    """What the dial as planned will surely send to the host, with the largest micro-batch that may come of it, and no
    more than half of what is free there. What turns out to be too much is given back."""
    dial, config = layers.dial, layers.core.config.get_text_config()
    streams = sum(LEAST_STREAMS[dial.level(index)] for index in range(dial.offload))
    size = streams * max(dial.micro_tokens or 0, work.max_tokens) * int(config.hidden_size) * 2
    return min(size, round(available_bytes() * HOST_SHARE))


def _missing(attempt: Attempt, budget_bytes: int, share: float) -> int:
    """Bytes to take from the room after an attempt that did not fit: what it lacked, as far as that is known, and no
    more than this share of the budget."""
    lacking = attempt.peak_bytes - budget_bytes
    most = round(share * budget_bytes)
    return (min(lacking, most) if lacking > 0 else most) + SLACK_BYTES // 4


def _tighten(layers: DecoderLayers, work: Work) -> bool:
    """The next setting with less memory, embeddings and micro-batches included; False at the end."""
    tighter = layers.dial.tighter(len(layers), work.max_tokens, work.longest)
    if tighter is None:
        return False
    layers.dial = tighter
    layers.follow(())
    return True


def _attempt(model: Any, layers: DecoderLayers, work: Work, budget_bytes: int, problem: DialProblem | None) -> Attempt:
    """The largest micro-batches, forward and backward, under the dial as it stands: each meets what others left."""
    started = time.perf_counter()
    if layers.dial.host_embeddings:
        keep_embeddings_on_host(model)
    release_memory()
    torch.cuda.reset_peak_memory_stats()
    passes = _run_all(model, layers, work, budget_bytes)
    reserved, allocated = torch.cuda.max_memory_reserved(), torch.cuda.max_memory_allocated()
    passes.state = []
    _drop_gradients(model)
    layers.offload.begin()
    release_memory()
    return Attempt(
        dial=str(layers.dial),
        room_bytes=problem.room.device_bytes if problem else 0,
        peak_bytes=reserved,
        allocated_bytes=allocated,
        graph_bytes=passes.graph_bytes,
        retries=tuple(passes.retries),
        elapsed_s=time.perf_counter() - started,
        # an allocator that has to give back and ask again stops the card each time: it fits, but crawls. One that still
        # grows may come to that: reason enough to solve again, none to change what somebody set, or to end the run
        fits=reserved <= budget_bytes
        and passes.ended
        and not passes.asked_again
        and not (passes.grew and problem is not None and layers.dial != tightest_dial(layers, work.longest)),
    )


@dataclass(slots=True)
class _Passes:
    """How often the allocator asked again in each of an attempt's passes, whether it did to the last of a micro-batch,
    whether the last pass of all still took clearly more than the one before, whether all ended, what the largest one
    took that is recorded, and what stands where the optimizer's state will."""

    retries: list[int] = field(default_factory=list)
    asked_again: bool = False
    grew: bool = False
    ended: bool = False
    graph_bytes: int = 0
    state: list[Tensor] = field(default_factory=list)

    def run(self, there_and_back: Callable[[], object]) -> None:
        before = allocator_retries()
        there_and_back()
        torch.cuda.synchronize()
        self.retries.append(allocator_retries() - before)

    def settle(self, there_and_back: Callable[[], object], model: Any, work: Work, budget_bytes: int) -> None:
        """Run until a pass takes hardly more than the one before: each finds free what the last left, between other
        blocks. The first leaves gradients, and the optimizer its state, upon which the second has less room."""
        self.run(there_and_back)
        self.state = _optimizer_state(model, work)
        for _ in range(MOST_PASSES - 1):
            if not self.graph_bytes:  # graphs add to gradients that stay
                _drop_gradients(model)
            stood = torch.cuda.memory_reserved()
            self.run(there_and_back)
            now = torch.cuda.memory_reserved()
            if now > budget_bytes:
                return
            self.grew = now - stood > REST_SHARE * (budget_bytes - now)
            if not self.retries[-1] and not self.grew:
                return
        self.asked_again = self.asked_again or bool(self.retries[-1])


def _drop_gradients(model: Any) -> None:
    for weight in model.parameters():
        weight.grad = None


def _optimizer_state(model: Any, work: Work) -> list[Tensor]:
    """What the optimizer will keep: two tensors for each weight that is trained, of what is coming but the gradients,
    which are there."""
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    gradient_bytes = sum(weight.numel() * weight.element_size() for weight in trained)
    share = max(0, work.coming_bytes - gradient_bytes) / max(1, sum(weight.numel() for weight in trained))
    sizes = [round(weight.numel() * share / 2) for weight in trained for _ in range(2)]
    return [torch.empty(size, dtype=torch.uint8, device="cuda") for size in sizes]


def _run_all(model: Any, layers: DecoderLayers, work: Work, budget_bytes: int) -> _Passes:
    """The largest micro-batch, until it has settled. Where the dial has graphs, the largest that is recorded before
    that, as it is and recorded: what runs without meets the graphs' memory then."""
    micro_tokens = layers.dial.micro_tokens or work.max_tokens
    largest, recorded, passes = work.batch_of(micro_tokens), None, _Passes()
    graphs = Graphs(layers, work.longest, [weight for weight in model.parameters() if weight.requires_grad])
    if layers.dial.graphs:
        most = min(layers.dial.graphs, largest.tokens)
        recorded = work.within(micro_tokens, most) if graphs.records else None
        layers.dial = replace(layers.dial, graphs=most if recorded is not None else 0)
    try:
        with layers:
            if recorded is not None:
                stood = torch.cuda.memory_allocated()
                for _ in range(2):
                    passes.run(partial(graphs.run, recorded, _share(recorded), partial(_there_and_back, work)))
                    taken = torch.cuda.max_memory_allocated() - stood - graphs.gradient_bytes
                    passes.graph_bytes = graphs.arena_bytes = graphs.arena_bytes or taken
                passes.asked_again = bool(passes.retries[-1])
            passes.settle(partial(_there_and_back, work, largest, _share(largest)), model, work, budget_bytes)
        passes.ended = True
    except torch.OutOfMemoryError:
        pass
    if graphs.failed:
        layers.dial = replace(layers.dial, graphs=0)
    graphs.forget()
    return passes


def _share(batch: MicroBatch) -> float:
    return 1 / max(batch.supervised, 1)


def _there_and_back(work: Work, batch: MicroBatch, share: Tensor | float) -> Tensor:
    loss = work.loss_of(batch, share)
    loss.backward()
    return loss.detach()
