"""The rehearsal: before the first step, the dial is solved with this card's own figures and the largest micro-batch is
run twice, forward and backward, within the budget. What could not finish shows here, not at hour three."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch
from torch import Tensor

from lorafit.backbone import FrozenLinear4bit
from lorafit.config.dial import Dial
from lorafit.engine.batch import MicroBatch
from lorafit.engine.host_embeddings import HostEmbedding, keep_embeddings_on_host
from lorafit.engine.layers import DecoderLayers
from lorafit.engine.measure import LevelCost, link_rates, measure_levels, unpack_s
from lorafit.engine.vocabulary_loss import CHUNK_BYTES
from lorafit.errors import TrainingError
from lorafit.planning.dial_solver import Room, solve_micro
from lorafit.planning.layer_costs import LayerCosts, Link
from lorafit.planning.timeline import offload_schedule

SLACK_BYTES = 192 << 20
"""Left free: what cuBLAS and cuDNN take for themselves, and what the allocator loses between blocks."""
SOLVED_TRIES = 6
STEP_SHARE = 0.04
"""Of the budget: the most that one more solving takes away."""
HOST_SHARE = 0.5
"""Of the host's free memory that may be page-locked."""

BatchOf = Callable[[int], MicroBatch]
"""The largest micro-batch of the run when none may exceed so many tokens, on the device."""


@dataclass(frozen=True, slots=True)
class Work:
    """What is to be fitted: the largest micro-batches and their loss, as training runs them, and what they are cut by.

    `max_tokens` of a full micro-batch, `longest` row and mean step, in tokens; `coming_bytes`: adapter gradients and
    optimizer state, which are not there yet.
    """

    batch_of: BatchOf
    loss_of: Callable[[MicroBatch], Tensor]
    max_tokens: int
    longest: int
    step_tokens: float
    coming_bytes: int


@dataclass(frozen=True, slots=True)
class Attempt:
    """One rehearsed dial, the room it was solved for (0: it was not), and the peak it took; `fits` says whether that
    was within the budget, without the allocator having to give back and ask again."""

    dial: str
    room_bytes: int
    peak_bytes: int
    fits: bool


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """How it went: the dial that fits and its offload schedule, the peak it took of the budget, the seconds of
    compiling and of all, and every attempt."""

    dial: Dial
    schedule: tuple[int, ...]
    peak_bytes: int
    budget_bytes: int
    compile_s: float
    elapsed_s: float
    attempts: tuple[Attempt, ...]


def rehearse(model: Any, layers: DecoderLayers, work: Work, budget_bytes: int, *, solves: bool) -> Rehearsal:
    """Turn `layers` to the fastest dial that fits `budget_bytes` (when `solves`), and prove it on the largest
    micro-batch. When that needs more than was reckoned, the dial is solved again for that much less room, or turned
    tighter. Leaves gradients and random states as they were.

    Raises TrainingError when even the tightest setting does not fit.
    """
    started = time.perf_counter()
    attempts: list[Attempt] = []
    with torch.random.fork_rng(devices=[torch.cuda.current_device()]):
        problem = _problem(model, layers, work, budget_bytes) if solves else None
        if problem is not None:
            _turn(layers, problem)
        while not (attempt := _attempt(model, layers, work, budget_bytes, problem)).fits:
            attempts.append(attempt)
            if problem is not None and len(attempts) <= SOLVED_TRIES:
                problem = replace(problem, room=problem.room.less(_missing(attempt, budget_bytes)))
                _turn(layers, problem)
            elif not _tighten(layers, work):
                raise _does_not_fit()
        attempts.append(attempt)
    layers.dial = replace(layers.dial, host_embeddings=isinstance(model.get_input_embeddings(), HostEmbedding))
    return Rehearsal(
        dial=layers.dial,
        schedule=tuple(layers.offload.schedule),
        peak_bytes=attempt.peak_bytes,
        budget_bytes=budget_bytes,
        compile_s=layers.compile_s,
        elapsed_s=time.perf_counter() - started,
        attempts=tuple(attempts),
    )


def _missing(attempt: Attempt, budget_bytes: int) -> int:
    """Bytes to take from the room after an attempt that did not fit: what it lacked, as far as that is known."""
    lacking = attempt.peak_bytes - budget_bytes
    most = round(STEP_SHARE * budget_bytes)
    return (min(lacking, most) if lacking > 0 else most) + SLACK_BYTES // 4


def _tighten(layers: DecoderLayers, work: Work) -> bool:
    """The next setting with less memory, embeddings and micro-batches included; False at the end."""
    tighter = layers.dial.tighter(len(layers), work.max_tokens, work.longest)
    if tighter is None:
        return False
    layers.dial = tighter
    layers.follow(())
    return True


@dataclass(frozen=True, slots=True)
class _Problem:
    """What the solver needs: costs of a micro-batch of `tokens`, the room, and what the work is cut by."""

    costs: LayerCosts
    room: Room
    tokens: int
    work: Work


def _problem(model: Any, layers: DecoderLayers, work: Work, budget_bytes: int) -> _Problem | None:
    """Measure the first layer and the link; None when everything can be kept, which needs no solving."""
    batch, keep = _measured(model, layers, work, "keep")
    free = budget_bytes - torch.cuda.memory_reserved() - work.coming_bytes - SLACK_BYTES
    loss_bytes = _loss_bytes(model, batch)
    everything = len(layers) * keep.saved_bytes + max(keep.working_bytes, loss_bytes)
    if everything <= free and batch.tokens == work.batch_of(work.max_tokens).tokens:
        layers.dial = Dial()
        return None
    cheaper = _measured(model, layers, work, "feed_forward", batch)[1] if layers.compiled else keep
    rates = link_rates()
    room = Room(
        device_bytes=free,
        host_bytes=round(psutil.virtual_memory().available * HOST_SHARE),
        link=Link(*rates),
        by_bytes=True,
        embedding_bytes=_movable_bytes(model),
        embedding_s=batch.tokens * _hidden_bytes(model) / rates[1],
    )
    return _Problem(_costs(layers, batch, keep, cheaper, loss_bytes), room, batch.tokens, work)


def _measured(
    model: Any, layers: DecoderLayers, work: Work, level: str, batch: MicroBatch | None = None
) -> tuple[MicroBatch, LevelCost]:
    """The first layer's cost at `level` on `batch`, or on the largest micro-batch of which one layer fits at all."""
    tokens = work.max_tokens
    while True:
        tried = batch or work.batch_of(tokens)
        try:
            cost = measure_levels(layers, partial(work.loss_of, tried), [level])[level]
        except torch.OutOfMemoryError:
            cost = None
        _empty()
        if cost is not None:
            return tried, cost
        if _movable_bytes(model):
            keep_embeddings_on_host(model)  # the first thing to go
        elif batch is None and tokens // 2 >= work.longest:
            tokens //= 2
        else:
            raise _does_not_fit()


def _turn(layers: DecoderLayers, problem: _Problem) -> None:
    """Set the dial that the solver finds, and the schedule of its offload; the tightest one where it finds none."""
    costs, room, work = problem.costs, problem.room, problem.work
    step_tokens = max(work.step_tokens, problem.tokens)
    found = solve_micro(costs, room, tokens=problem.tokens, longest=work.longest, step_tokens=step_tokens)
    if found is None:
        layers.dial = Dial(whole=len(layers), offload=len(layers), host_embeddings=True, micro_tokens=work.longest)
        layers.follow(())
        return
    layers.dial = found.dial
    share = (found.dial.micro_tokens or problem.tokens) / problem.tokens
    size = room.device_bytes + (room.embedding_bytes if found.dial.host_embeddings else 0)
    layers.follow(offload_schedule(costs.scaled(share), found.dial, size, by_bytes=True).on_device_from)


def _costs(
    layers: DecoderLayers, batch: MicroBatch, keep: LevelCost, cheaper: LevelCost, loss_bytes: int
) -> LayerCosts:
    frozen = [module for module in layers.layers[0].modules() if isinstance(module, FrozenLinear4bit)]
    again_s = max(cheaper.backward_s - keep.backward_s, 0.0)
    stream = batch.ids.numel() * _hidden_bytes(layers.core)
    return LayerCosts(
        layers=len(layers),
        kept_bytes=keep.saved_bytes,
        feed_forward_bytes=cheaper.saved_bytes,
        whole_bytes=min(stream, cheaper.saved_bytes),
        forward_s=keep.forward_s,
        backward_s=keep.backward_s,
        recompute_feed_forward_s=again_s,
        recompute_layer_s=keep.forward_s,
        kept_working_bytes=keep.working_bytes,
        feed_forward_working_bytes=cheaper.working_bytes,
        whole_working_bytes=keep.working_bytes + keep.saved_bytes - stream,
        fixed_s=unpack_s(layers),
        launch_s=keep.launch_s,
        fixed_working_bytes=max((module.dense_bytes() for module in frozen), default=0),
        loss_bytes=loss_bytes,
        fixed_loss_bytes=min(CHUNK_BYTES, loss_bytes),
        loss_s=_loss_s(layers, batch, keep.forward_s, frozen),
    )


def _loss_s(layers: DecoderLayers, batch: MicroBatch, forward_s: float, frozen: list[FrozenLinear4bit]) -> float:
    """Seconds of the head's matmul and of the one back through it, at the rate of a layer's own matmuls."""
    weights = sum(module.out_features * module.in_features for module in frozen)
    head = layers.core.get_output_embeddings()
    if not weights or head is None:
        return 0.0
    return 2 * forward_s * batch.supervised / batch.tokens * head.weight.numel() / weights


def _attempt(model: Any, layers: DecoderLayers, work: Work, budget_bytes: int, problem: _Problem | None) -> Attempt:
    """Two micro-batches, forward and backward, under the dial as it stands: the second meets what the first left."""
    batch = work.batch_of(layers.dial.micro_tokens or work.max_tokens)
    if layers.dial.host_embeddings:
        keep_embeddings_on_host(model)
    _empty()
    torch.cuda.reset_peak_memory_stats()
    retries = _allocator_retries()
    try:
        with layers:
            for _ in range(2):
                (work.loss_of(batch) / max(batch.supervised, 1)).backward()
        torch.cuda.synchronize()
        peak = int(torch.cuda.max_memory_reserved())
        # an allocator that has to give back and ask again stops the card each time: it fits, but crawls
        fits = peak + work.coming_bytes <= budget_bytes and _allocator_retries() == retries
    except torch.OutOfMemoryError:
        peak, fits = int(torch.cuda.max_memory_reserved()), False
    for weight in model.parameters():
        weight.grad = None
    layers.offload.begin()
    _empty()
    return Attempt(str(layers.dial), problem.room.device_bytes if problem else 0, peak, fits)


def _allocator_retries() -> int:
    return int(torch.cuda.memory_stats().get("num_alloc_retries", 0))


def _loss_bytes(model: Any, batch: MicroBatch) -> int:
    """A chunk of logits, and the hidden states with their gradient in 32 bits."""
    return CHUNK_BYTES + batch.tokens * _hidden_bytes(model) * 4


def _hidden_bytes(model: Any) -> int:
    """Bytes of one token's hidden state in 16 bits."""
    return 2 * int(model.config.get_text_config().hidden_size)


def _movable_bytes(model: Any) -> int:
    """Bytes of the input embeddings when they can wait on the host; 0 when they are the output head too."""
    config = model.config.get_text_config()
    table = getattr(model.get_input_embeddings(), "weight", None)  # None when it is on the host already
    if table is None or config.tie_word_embeddings or table.requires_grad or table.device.type != "cuda":
        return 0
    return int(table.numel() * table.element_size())


def _empty() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def _does_not_fit() -> TrainingError:
    return TrainingError(
        "the longest row does not fit into the card's memory, or the budget, with everything recomputed and offloaded",
        where="memory",
        fix="shorten the longest rows (--long drop), lower rank or targets, or use a larger card",
    )
