"""DialProblem: what one decoder layer costs on this card, the room there is, and the dial the solver finds for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from lorafit.config.dial import Dial
from lorafit.engine.allocator import release_memory
from lorafit.engine.cuda_graphs import recordable
from lorafit.engine.layers.decoder import DecoderLayers
from lorafit.engine.layers.host_embeddings import keep_embeddings_on_host
from lorafit.engine.loss.vocabulary import CHUNK_BYTES
from lorafit.engine.measure import (
    LevelCost,
    feed_forward_products,
    frozen_linears,
    link_rates,
    measure_level,
    unpack_s,
    unpacked_bytes,
)
from lorafit.engine.packing import MicroBatch
from lorafit.errors import TrainingError
from lorafit.planning.detect import available_bytes
from lorafit.planning.dial_solver import Room, Solution, solve, solve_micro
from lorafit.planning.graphs import FILLED, graph_tokens
from lorafit.planning.layer_costs import LayerCosts, Link, Split
from lorafit.planning.timeline import OffloadSchedule, fullest_bytes, offload_schedule

SLACK_BYTES = 192 << 20
"""Left free: what cuBLAS and cuDNN take for themselves."""
LOST_SHARE = 0.03
"""Of the budget: what the allocator loses between blocks that come and go in another order than they came."""
HOST_SHARE = 0.5
"""Of the host's free memory that may be page-locked."""
WORTH_COMPILING = 0.015
"""Gain in speed below which layers are not compiled at a second level: seconds each, before the first step."""
RELIEF_SHARE, RELIEF_TRIES = 0.04, 5
"""Of the room: what a run gives up that turned out to fill its memory; as often again while that changes nothing."""
UNWANTED_S, NEVER_BYTES = 1e6, 1 << 50
"""What recomputing is said to take at a level that no layer is compiled at, and a level to weigh that is ruled out."""

BatchOf = Callable[[int], MicroBatch]
"""The largest micro-batch of the run when none may exceed so many tokens, on the device."""


@dataclass(frozen=True, slots=True)
class Work:
    """What is to be fitted: the largest micro-batches, their loss times a share, as training runs them, and what they
    are cut by.

    `max_tokens` of the largest micro-batch worth trying, `longest` row and mean step, in tokens; `coming_bytes`:
    adapter gradients and optimizer state, which are not there yet. `within`: of the micro-batches that have at most
    its first argument's tokens, the largest that has at most its second's, or None.
    """

    batch_of: BatchOf
    loss_of: Callable[[MicroBatch, Tensor | float], Tensor]
    max_tokens: int
    longest: int
    step_tokens: float
    coming_bytes: int
    within: Callable[[int, int], MicroBatch | None] = lambda micro_tokens, limit: None


@dataclass(frozen=True, slots=True)
class DialProblem:
    """What the solver needs: costs of a micro-batch of `tokens`, the room, and what the work is cut by."""

    costs: LayerCosts
    room: Room
    tokens: int
    work: Work

    def less(self, size_bytes: int) -> DialProblem:
        """The same with that much less room on the device."""
        return replace(self, room=self.room.less(size_bytes))

    def after_tightest(self, spare_bytes: int, failed_bytes: int | None = None) -> DialProblem | None:
        """The same with the room that there was after all, when the tightest dial, taken for want of any that fits,
        left `spare_bytes` of the budget; None where a dial was found, or none is that gains. Of a room of
        `failed_bytes` it is known that its dial did not fit."""
        if self._dial() is not None:
            return None
        layers = self.costs.layers
        share = self.work.longest / self.tokens
        tightest = Split(self.costs.scaled(share), layers, layers)
        taken = tightest.device_bytes(layers) - self.room.embedding_bytes
        room = taken + spare_bytes
        if failed_bytes is not None:
            room = min(room, (self.room.device_bytes + failed_bytes) // 2)
        roomier = replace(self, room=replace(self.room, device_bytes=room))
        found = roomier._solved(self.costs)
        worth_s = tightest.work_s / share * self._step_share() / (1 + WORTH_COMPILING)
        return roomier if found is not None and found.step_s < worth_s else None

    def turn(self, layers: DecoderLayers) -> None:
        """Set the dial that the solver finds, and the schedule of its offload; the tightest where it finds none."""
        found = self._dial()
        if found is None:
            layers.dial = tightest_dial(layers, self.work.longest)
            layers.follow(())
        else:
            self._turn(layers, found)

    def _turn(self, layers: DecoderLayers, found: Dial) -> None:
        # measured on fewer tokens than `max_tokens`, its micro-batch must be said
        layers.dial = found.sized(self.tokens, self.work.max_tokens)
        schedule = self._schedule(found)
        layers.follow(schedule.on_device_from, partial(self._relieve, layers, found, schedule))

    def _schedule(self, found: Dial) -> OffloadSchedule:
        return offload_schedule(self._costs_with(found), found, self._room_with(found).device_bytes, by_bytes=True)

    def _costs_with(self, found: Dial) -> LayerCosts:
        """The costs of its micro-batch."""
        return self.costs.scaled((found.micro_tokens or self.tokens) / self.tokens)

    def _room_with(self, found: Dial) -> Room:
        """The room with the embeddings where it has them, to stay there."""
        return self.room.without_embeddings() if found.host_embeddings else replace(self.room, embedding_bytes=0)

    def _relieve(self, layers: DecoderLayers, turned: Dial, schedule: OffloadSchedule) -> bool:
        """In the middle of a run, turn `layers` from the dial `turned` and its schedule to the fastest that need a
        little less room, with micro-batches and embeddings as they are, and where possible at the levels that layers
        are compiled at; False where there are none."""
        costs, room = _at_levels_of(turned, self._costs_with(turned)), self._room_with(turned).device_bytes
        # what the reckoning leaves unused is not what the run has too little of
        unused = max(0, room - fullest_bytes(self._costs_with(turned), turned, schedule))
        share = round(RELIEF_SHARE * room)
        for tried in range(RELIEF_TRIES):
            problem = self.less(unused + share * (tried + 1))
            solved = solve(costs, problem._room_with(turned))
            if solved is None:
                return False
            found = replace(solved.dial, micro_tokens=turned.micro_tokens, host_embeddings=turned.host_embeddings)
            if turned.whole + turned.feed_forward == costs.layers:  # its costs know of no other level
                found = replace(found, feed_forward=costs.layers - found.whole)
            if (found, problem._schedule(found)) != (turned, schedule):
                standing = layers.dial  # says of micro-batches and embeddings how they are
                problem._turn(layers, found)
                layers.dial = replace(
                    layers.dial, micro_tokens=standing.micro_tokens, host_embeddings=standing.host_embeddings
                )
                return True
        return False

    def _dial(self) -> Dial | None:
        """The fastest dial that fits; one whose layers are all at one level, if that is hardly slower."""
        found = self._solved(self.costs)
        if found is None or not 0 < found.dial.feed_forward < self.costs.layers:
            return found.dial if found else None
        alike = self._solved(self.costs.without_keeping())
        if alike is None or alike.dial.whole or alike.step_s > found.step_s * (1 + WORTH_COMPILING):
            return found.dial
        return replace(alike.dial, feed_forward=self.costs.layers)

    def _solved(self, costs: LayerCosts) -> Solution | None:
        tokens = self.tokens
        step_tokens = tokens * self._step_share()
        return solve_micro(costs, self.room, tokens=tokens, longest=self.work.longest, step_tokens=step_tokens)

    def _step_share(self) -> float:
        """The mean step in micro-batches as large as the measured one; at least one."""
        return max(self.work.step_tokens / self.tokens, 1.0)


def _at_levels_of(dial: Dial, costs: LayerCosts) -> LayerCosts:
    """`costs` that lead to the levels of `dial` alone, as long as anything fits at them."""
    if dial.whole == costs.layers:
        return replace(costs, kept_bytes=NEVER_BYTES, feed_forward_bytes=NEVER_BYTES)
    if dial.whole + dial.feed_forward == costs.layers:
        costs = costs.without_keeping()
    elif not dial.feed_forward:
        costs = replace(costs, recompute_feed_forward_s=UNWANTED_S)
    return costs if dial.whole else replace(costs, recompute_layer_s=UNWANTED_S)


def tightest_dial(layers: DecoderLayers, longest: int) -> Dial:
    """The dial that needs least: everything recomputed and sent away, and micro-batches of the `longest` row."""
    whole = len(layers)
    return Dial(whole=whole, offload=whole, host_embeddings=True, micro_tokens=longest)


def pose(
    model: Any, layers: DecoderLayers, work: Work, budget_bytes: int, meanwhile: Callable[[], object] | None = None
) -> DialProblem | None:
    """The problem of fitting `work` into `budget_bytes`: the first layer is measured, and the link. `meanwhile` is
    called when that layer is about to be compiled.

    None when everything can be kept: `layers` are turned to that, with what room is left given to unpacked weights,
    and nothing needs solving. Raises TrainingError when a single layer does not fit.
    """
    # a layer is measured with all weights unpacked or with none, whichever is likelier to be what it comes to
    if layers.dial.dense < len(layers):
        layers.dial = replace(layers.dial, dense=0)
    batch, keep, cheaper = _levels(model, layers, work, meanwhile)
    free = budget_bytes - torch.cuda.memory_reserved() - work.coming_bytes - SLACK_BYTES
    loss_bytes = _loss_bytes(model, batch)
    everything = len(layers) * keep.saved_bytes + max(keep.working_bytes, loss_bytes)
    if everything <= free and batch.tokens == work.batch_of(work.max_tokens).tokens:
        spare = free - everything - round(LOST_SHARE * budget_bytes)
        graphs = graph_tokens(batch.tokens, keep.forward_s + keep.backward_s, keep.launch_s, work.step_tokens)
        again = round(everything * FILLED * min(graphs / batch.tokens, 1.0))
        if not recordable(layers) or again > spare:
            graphs = again = 0
        layers.dial = Dial(dense=dense_layers(layers, spare - again), graphs=graphs)
        return None
    if layers.dial.dense:  # what was planned with does not fit: weights are unpacked on each call then
        layers.dial = replace(layers.dial, dense=0)
        keep, cheaper = (_unpacking(layers, cost) for cost in (keep, cheaper))
    rates = link_rates()
    room = Room(
        device_bytes=free - round(LOST_SHARE * budget_bytes),
        host_bytes=round(available_bytes() * HOST_SHARE),
        link=Link(*rates),
        by_bytes=True,
        embedding_bytes=_movable_bytes(model),
        embedding_s=batch.tokens * _hidden_bytes(model) / rates[1],
    )
    return DialProblem(_costs(layers, batch, keep, cheaper, loss_bytes), room, batch.tokens, work)


def _unpacking(layers: DecoderLayers, cost: LevelCost) -> LevelCost:
    """What a layer costs whose weights are packed, from that of one whose weights lay unpacked."""
    again_s, weight = unpack_s(layers), unpacked_bytes(layers)
    return replace(
        cost,
        forward_s=cost.forward_s + again_s,
        backward_s=cost.backward_s + again_s,
        working_bytes=cost.working_bytes + weight,
    )


def dense_layers(layers: DecoderLayers, spare_bytes: int) -> int:
    """Of how many layers the unpacked weights fit into `spare_bytes`, from the first on."""
    sizes = [sum(module.dense_bytes() for module in linears) for linears in layers.frozen]
    return sum(size <= spare_bytes for size in accumulate(sizes)) if any(sizes) else 0


def _levels(
    model: Any, layers: DecoderLayers, work: Work, meanwhile: Callable[[], object] | None
) -> tuple[MicroBatch, LevelCost, LevelCost]:
    """The first layer's cost with everything kept, and with its feed-forward recomputed.

    One is measured, the one that the dial as planned has most layers at; the other is reckoned where that is exact,
    for each level measured is one compiled.
    """
    planned = "feed_forward" if 2 * layers.dial.feed_forward >= len(layers) else "keep"
    first = planned if layers.compiled and layers.widths else "keep"
    batch, cost = _measured(model, layers, work, first, meanwhile=meanwhile)
    if not layers.compiled or not layers.widths:  # a family that does not compile has no such level
        return batch, cost, cost
    products = feed_forward_products(layers, batch.tokens)
    if products is not None:
        return (batch, cost, products.left_out_of(cost)) if first == "keep" else (batch, products.kept_in(cost), cost)
    other = _measured(model, layers, work, "keep" if first == "feed_forward" else "feed_forward", batch)[1]
    return (batch, cost, other) if first == "keep" else (batch, other, cost)


def _measured(
    model: Any,
    layers: DecoderLayers,
    work: Work,
    level: str,
    batch: MicroBatch | None = None,
    meanwhile: Callable[[], object] | None = None,
) -> tuple[MicroBatch, LevelCost]:
    """The first layer's cost at `level` on `batch`, or on the largest micro-batch of which one layer fits at all."""
    tokens = work.max_tokens
    while True:
        tried = batch or work.batch_of(tokens)
        cost = measure_level(layers, partial(work.loss_of, tried, 1.0), level, meanwhile)
        release_memory()
        if cost is not None:
            return tried, cost
        if layers.dial.dense:
            layers.dial = replace(layers.dial, dense=0)  # there is less room than was planned with
        elif _movable_bytes(model):
            keep_embeddings_on_host(model)
        elif batch is None and tokens // 2 >= work.longest:
            tokens //= 2
        else:
            raise does_not_fit()


def _costs(
    layers: DecoderLayers, batch: MicroBatch, keep: LevelCost, cheaper: LevelCost, loss_bytes: int
) -> LayerCosts:
    frozen = frozen_linears(layers)
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
        fixed_working_bytes=unpacked_bytes(layers),
        loss_bytes=loss_bytes,
        fixed_loss_bytes=min(CHUNK_BYTES, loss_bytes),
        loss_s=_loss_s(layers, batch, keep.forward_s, frozen),
    )


def _loss_s(layers: DecoderLayers, batch: MicroBatch, forward_s: float, frozen: Sequence[nn.Linear]) -> float:
    """Seconds of the head's matmul and of the one back through it, at the rate of a layer's own matmuls."""
    weights = sum(module.out_features * module.in_features for module in frozen)
    head = layers.core.get_output_embeddings()
    if not weights or head is None:
        return 0.0
    return 2 * forward_s * batch.supervised / batch.tokens * head.weight.numel() / weights


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


def does_not_fit() -> TrainingError:
    """The error of a row that no setting makes fit."""
    return TrainingError(
        "the longest row does not fit into the card's memory, or the budget, with everything recomputed and offloaded",
        where="memory",
        fix="shorten the longest rows (--long drop), lower rank or targets, or use a larger card",
    )
