"""Problem: what one decoder layer costs on this GPU, the room there is, and the policy that the solver finds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from lorafit.config.memory_policy import MemoryPolicy
from lorafit.engine.autotune.measure import (
    LevelCost,
    feed_forward_products,
    frozen_linears,
    link_rates,
    measure_level,
    unpack_s,
    unpacked_bytes,
)
from lorafit.engine.cuda_graphs import recordable
from lorafit.engine.layers.decoder import DecoderLayers
from lorafit.engine.layers.host_embeddings import keep_embeddings_on_host
from lorafit.engine.loss.vocabulary import CHUNK_BYTES
from lorafit.engine.packing import MicroBatch
from lorafit.engine.runtime import release_memory
from lorafit.errors import TrainingError
from lorafit.hardware.detect import available_bytes
from lorafit.memory.layer_costs import (
    FILLED,
    LayerCosts,
    Link,
    OffloadSchedule,
    Split,
    fullest_bytes,
    graph_tokens,
    offload_schedule,
)
from lorafit.memory.solver import Room, Solution, solve, solve_micro

SLACK_BYTES = 192 << 20
"""Bytes left free for cuBLAS and cuDNN."""
LOST_SHARE = 0.03
"""Share of the budget that the allocator loses between blocks."""
HOST_SHARE = 0.5
"""Share of the host's free memory that may be page-locked."""
WORTH_COMPILING = 0.015
"""Gain in speed below which layers are not compiled at a second level, as each takes seconds before the first step."""
RELIEF_SHARE, RELIEF_TRIES = 0.04, 5
"""Share of the room that a run gives up when it fills its memory, and how often while that changes nothing."""
UNWANTED_S, NEVER_BYTES = 1e6, 1 << 50
"""Seconds of recomputing at a level that no layer is compiled at, and bytes of a level that is ruled out."""

BatchOf = Callable[[int], MicroBatch]
"""Returns the run's largest micro-batch of at most so many tokens, on the device."""


@dataclass(frozen=True, slots=True)
class Work:
    """Hold the work to be fitted, as training runs it.

    Attributes:
        batch_of: The largest micro-batch of at most so many tokens.
        loss_of: The loss of a micro-batch, times a share.
        max_length: Tokens of the largest micro-batch worth trying.
        longest: Tokens of the longest row.
        step_tokens: Tokens of the mean step.
        coming_bytes: Adapter gradients and optimizer state, which are not allocated yet.
        within: The largest micro-batch with at most its second argument's tokens, where a step is cut into
            micro-batches of at most its first; None without one.
    """

    batch_of: BatchOf
    loss_of: Callable[[MicroBatch, Tensor | float], Tensor]
    max_length: int
    longest: int
    step_tokens: float
    coming_bytes: int
    within: Callable[[int, int], MicroBatch | None] = lambda micro_tokens, limit: None


@dataclass(frozen=True, slots=True)
class Problem:
    """Hold what the solver needs: the costs of a micro-batch of `tokens`, the room, and the work."""

    costs: LayerCosts
    room: Room
    tokens: int
    work: Work

    def less(self, size_bytes: int) -> Problem:
        """Return the same with that much less room on the device."""
        return replace(self, room=self.room.less(size_bytes))

    def smaller(self, size_bytes: int) -> Problem:
        """Return the same with that much less room than the policy found here takes."""
        taken = self._in_force()[0]
        return self.less(size_bytes + max(0, self.room.device_bytes - taken))

    def roomier(self, spare_bytes: int, failed_bytes: int | None = None) -> Problem | None:
        """Return the same with the room that was measured, after a policy left `spare_bytes` of the budget.

        The policy of a room of `failed_bytes` is known not to fit: the room stays halfway below. None where no policy
        gains by it.
        """
        taken, taken_s = self._in_force()
        room = taken + spare_bytes
        if failed_bytes is not None:
            room = min(room, (self.room.device_bytes + failed_bytes) // 2)
        roomier = replace(self, room=replace(self.room, device_bytes=room))
        found = roomier._solution()
        return roomier if found is not None and found.step_s < taken_s / (1 + WORTH_COMPILING) else None

    def _in_force(self) -> tuple[int, float]:
        """Return the bytes of the room that the policy found takes, and its predicted seconds of a step."""
        found = self._solution()
        if found is None:
            layers, share = self.costs.layers, self.work.longest / self.tokens
            smallest = Split(self.costs.scaled(share), layers, layers)
            taken_s = smallest.work_s / share * self._step_share()
            return smallest.device_bytes(layers) - self.room.embedding_bytes, taken_s
        policy = found.policy
        taken = fullest_bytes(self._costs_with(policy), policy, self._schedule(policy))
        return taken - (self.room.embedding_bytes if policy.host_embeddings else 0), found.step_s

    @property
    def has_policy(self) -> bool:
        """True when some policy fits the room; else the smallest one is taken."""
        return self._solution() is not None

    def apply(self, layers: DecoderLayers) -> None:
        """Set the policy that the solver finds and the schedule of its offload; the smallest where it finds none."""
        found = self._policy()
        if found is None:
            layers.policy = smallest_policy(layers, self.work.longest)
            layers.set_schedule(())
        else:
            self._apply(layers, found)

    def _apply(self, layers: DecoderLayers, found: MemoryPolicy) -> None:
        # measured on fewer tokens than `max_length`, its micro-batch must be said
        layers.policy = found.sized(self.tokens, self.work.max_length)
        schedule = self._schedule(found)
        layers.set_schedule(schedule.on_device_from, partial(self._reduce_slightly, layers, found, schedule))

    def _schedule(self, found: MemoryPolicy) -> OffloadSchedule:
        return offload_schedule(self._costs_with(found), found, self._room_with(found).device_bytes, by_bytes=True)

    def _costs_with(self, found: MemoryPolicy) -> LayerCosts:
        """The costs of its micro-batch."""
        return self.costs.scaled((found.micro_tokens or self.tokens) / self.tokens)

    def _room_with(self, found: MemoryPolicy) -> Room:
        """Return the room once the embeddings are where `found` has them."""
        return self.room.without_embeddings() if found.host_embeddings else replace(self.room, embedding_bytes=0)

    def _reduce_slightly(self, layers: DecoderLayers, turned: MemoryPolicy, schedule: OffloadSchedule) -> bool:
        """Apply, in the middle of a run, the fastest policy that needs a little less room than `turned`.

        Micro-batches and embeddings stay, and where possible the levels that layers are compiled at. False where there
        is no such policy.
        """
        costs, room = _at_levels_of(turned, self._costs_with(turned)), self._room_with(turned).device_bytes
        # what the reckoning leaves unused is not what the run has too little of
        unused = max(0, room - fullest_bytes(self._costs_with(turned), turned, schedule))
        share = round(RELIEF_SHARE * room)
        for tried in range(RELIEF_TRIES):
            problem = self.less(unused + share * (tried + 1))
            solved = solve(costs, problem._room_with(turned))
            if solved is None:
                return False
            found = replace(solved.policy, micro_tokens=turned.micro_tokens, host_embeddings=turned.host_embeddings)
            if (
                turned.recompute_layers + turned.recompute_mlp_layers == costs.layers
            ):  # its costs know of no other level
                found = replace(found, recompute_mlp_layers=costs.layers - found.recompute_layers)
            if (found, problem._schedule(found)) != (turned, schedule):
                standing = layers.policy  # says of micro-batches and embeddings how they are
                problem._apply(layers, found)
                layers.policy = replace(
                    layers.policy, micro_tokens=standing.micro_tokens, host_embeddings=standing.host_embeddings
                )
                return True
        return False

    def _policy(self) -> MemoryPolicy | None:
        """Return the policy of `_solution`."""
        found = self._solution()
        return found.policy if found else None

    def _solution(self) -> Solution | None:
        """Return the fastest policy that fits; one whose layers are all at one level, if that is hardly slower."""
        found = self._solved(self.costs)
        if found is None or not 0 < found.policy.recompute_mlp_layers < self.costs.layers:
            return found
        alike = self._solved(self.costs.without_keeping())
        if alike is None or alike.policy.recompute_layers or alike.step_s > found.step_s * (1 + WORTH_COMPILING):
            return found
        return replace(alike, policy=replace(alike.policy, recompute_mlp_layers=self.costs.layers))

    def _solved(self, costs: LayerCosts) -> Solution | None:
        tokens = self.tokens
        step_tokens = tokens * self._step_share()
        return solve_micro(costs, self.room, tokens=tokens, longest=self.work.longest, step_tokens=step_tokens)

    def _step_share(self) -> float:
        """The mean step in micro-batches as large as the measured one; at least one."""
        return max(self.work.step_tokens / self.tokens, 1.0)


def _at_levels_of(policy: MemoryPolicy, costs: LayerCosts) -> LayerCosts:
    """Return `costs` that lead to the levels of `policy` alone, as long as anything fits at them."""
    if policy.recompute_layers == costs.layers:
        return replace(costs, kept_bytes=NEVER_BYTES, feed_forward_bytes=NEVER_BYTES)
    if policy.recompute_layers + policy.recompute_mlp_layers == costs.layers:
        costs = costs.without_keeping()
    elif not policy.recompute_mlp_layers:
        costs = replace(costs, recompute_feed_forward_s=UNWANTED_S)
    return costs if policy.recompute_layers else replace(costs, recompute_layer_s=UNWANTED_S)


def smallest_policy(layers: DecoderLayers, longest: int) -> MemoryPolicy:
    """Return the policy that needs least: everything recomputed and offloaded, micro-batches of the `longest` row."""
    whole = len(layers)
    return MemoryPolicy(recompute_layers=whole, offloaded_layers=whole, host_embeddings=True, micro_tokens=longest)


def measured_problem(
    model: Any, layers: DecoderLayers, work: Work, budget_bytes: int, meanwhile: Callable[[], object] | None = None
) -> Problem | None:
    """Return the problem of fitting `work` into `budget_bytes`, after measuring the first layer and the link.

    `meanwhile` is called when that layer is about to be compiled. Where everything can be kept, `layers` are set to
    that, unused memory is given to dequantized weights, and there is no problem to solve. Raises TrainingError when a
    single layer does not fit.
    """
    # a layer is measured with all weights unpacked or with none, whichever is likelier to be what it comes to
    if layers.policy.dequantized_layers < len(layers):
        layers.policy = replace(layers.policy, dequantized_layers=0)
    batch, keep, cheaper = _levels(model, layers, work, meanwhile)
    free = budget_bytes - torch.cuda.memory_reserved() - work.coming_bytes - SLACK_BYTES
    loss_bytes = _loss_bytes(model, batch)
    everything = len(layers) * keep.saved_bytes + max(keep.working_bytes, loss_bytes)
    if everything <= free and batch.tokens == work.batch_of(work.max_length).tokens:
        spare = free - everything - round(LOST_SHARE * budget_bytes)
        graphs = graph_tokens(batch.tokens, keep.forward_s + keep.backward_s, keep.launch_s, work.step_tokens)
        again = round(everything * FILLED * min(graphs / batch.tokens, 1.0))
        if not recordable(layers) or again > spare:
            graphs = again = 0
        layers.policy = MemoryPolicy(
            dequantized_layers=dense_layers(layers, spare - again), cuda_graph_max_tokens=graphs
        )
        return None
    if layers.policy.dequantized_layers:  # what was planned with does not fit: weights are unpacked on each call then
        layers.policy = replace(layers.policy, dequantized_layers=0)
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
    return Problem(_costs(layers, batch, keep, cheaper, loss_bytes), room, batch.tokens, work)


def _unpacking(layers: DecoderLayers, cost: LevelCost) -> LevelCost:
    """Return the cost of a layer with packed weights, from that of one with dequantized weights."""
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
    """Return the first layer's cost with everything kept, and with its MLP recomputed.

    The level of most layers of the planned policy is measured. The other is reckoned where that is exact, because each
    level measured is one compiled.
    """
    planned = "feed_forward" if 2 * layers.policy.recompute_mlp_layers >= len(layers) else "keep"
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
    tokens = work.max_length
    while True:
        tried = batch or work.batch_of(tokens)
        cost = measure_level(layers, partial(work.loss_of, tried, 1.0), level, meanwhile)
        release_memory()
        if cost is not None:
            return tried, cost
        if layers.policy.dequantized_layers:
            layers.policy = replace(layers.policy, dequantized_layers=0)  # there is less room than was planned with
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
        "the longest row does not fit into the GPU's memory, or the budget, with everything recomputed and offloaded",
        where="memory",
        fix="shorten the longest rows (--on-long drop), lower rank or targets, or use a larger GPU",
    )
