"""Problem: the cost of one decoder layer, the available memory, and the solved policy."""

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
    dequantize_s,
    dequantized_bytes,
    frozen_linears,
    link_rates,
    measure_level,
    mlp_matmuls,
)
from lorafit.engine.cuda_graphs import recordable
from lorafit.engine.layers.decoder import DecoderLayers
from lorafit.engine.layers.host_embeddings import keep_embeddings_on_host
from lorafit.engine.loss.vocabulary import CHUNK_BYTES, gradient_bytes
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
"""Least gain in speed that is worth compiling a second level, which takes seconds."""
RELIEF_SHARE, RELIEF_TRIES = 0.04, 5
"""Share of the memory that a full run gives up, and tries until the policy changes."""
UNWANTED_S, NEVER_BYTES = 1e6, 1 << 50
"""Seconds of recomputing at a level that is not compiled, and bytes of an excluded level."""
BatchOf = Callable[[int], MicroBatch]
"""Returns the run's largest micro-batch of at most this number of tokens, on the device."""


@dataclass(frozen=True, slots=True)
class Workload:
    """Hold the workload to be fitted, as training runs it.

    Attributes:
        batch_of: The largest micro-batch of at most this number of tokens.
        loss_of: The loss of a micro-batch, times a share.
        max_length: Tokens of the largest micro-batch worth trying.
        longest: Tokens of the longest row.
        step_tokens: Tokens of the mean step, in this process.
        coming_bytes: Adapter gradients and optimizer state, which are not allocated yet.
        within: The largest micro-batch of at most its second argument's tokens, of a step cut at its first; or None.
        between_bytes: Bytes that each micro-batch of a step after the first moves over the link to the host.
    """

    batch_of: BatchOf
    loss_of: Callable[[MicroBatch, Tensor | float], Tensor]
    max_length: int
    longest: int
    step_tokens: float
    coming_bytes: int
    within: Callable[[int, int], MicroBatch | None] = lambda micro_tokens, limit: None
    between_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Problem:
    """Hold the solver's input: the costs of a micro-batch of `tokens`, the available memory, and the workload."""

    costs: LayerCosts
    room: Room
    tokens: int
    work: Workload

    def less(self, size_bytes: int) -> Problem:
        """Return the problem with that much less memory on the device."""
        return replace(self, room=self.room.less(size_bytes))

    def smaller(self, size_bytes: int) -> Problem:
        """Return the problem with that much less memory than the solved policy takes."""
        taken = self._taken()[0]
        return self.less(size_bytes + max(0, self.room.device_bytes - taken))

    def roomier(self, spare_bytes: int, failed_bytes: int | None) -> Problem | None:
        """Return the problem with the measured memory, after a policy left `spare_bytes` of the budget.

        The policy for `failed_bytes` is known not to fit, so the memory stays at most halfway to it. None if no policy
        gains by it.
        """
        taken, taken_s = self._taken()
        room = taken + spare_bytes
        if failed_bytes is not None:
            room = min(room, (self.room.device_bytes + failed_bytes) // 2)
        roomier = replace(self, room=replace(self.room, device_bytes=room))
        found = roomier._solution()
        return roomier if found is not None and found.step_s < taken_s / (1 + WORTH_COMPILING) else None

    def _taken(self) -> tuple[int, float]:
        """Return the bytes that the solved policy takes, and its predicted seconds of a step."""
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
        """Return True if some policy fits; else the smallest one is taken."""
        return self._solution() is not None

    def apply(self, layers: DecoderLayers) -> None:
        """Set the solved policy and its offload schedule; without a solution, the smallest policy."""
        found = self._solution()
        if found is None:
            layers.policy = smallest_policy(layers, self.work.longest)
            layers.set_schedule(())
        else:
            self._apply(layers, found.policy)

    def _apply(self, layers: DecoderLayers, found: MemoryPolicy) -> None:
        # with fewer measured tokens than `max_length`, the policy must name its micro-batch
        layers.policy = found.sized(self.tokens, self.work.max_length)
        schedule = self._schedule(found)
        layers.set_schedule(schedule.on_device_from, partial(self._reduce_slightly, layers, found, schedule))

    def _schedule(self, found: MemoryPolicy) -> OffloadSchedule:
        return offload_schedule(self._costs_with(found), found, self._room_with(found).device_bytes)

    def _costs_with(self, found: MemoryPolicy) -> LayerCosts:
        """Return the costs of the policy's micro-batch."""
        return self.costs.scaled((found.micro_tokens or self.tokens) / self.tokens)

    def _room_with(self, found: MemoryPolicy) -> Room:
        """Return the available memory with the embeddings placed as in `found`."""
        return self.room.without_embeddings() if found.host_embeddings else replace(self.room, embedding_bytes=0)

    def _reduce_slightly(self, layers: DecoderLayers, current: MemoryPolicy, schedule: OffloadSchedule) -> bool:
        """Apply the fastest policy that needs a little less memory than `current`.

        It is called in the middle of a run. Micro-batches and embeddings stay, and where possible also the levels that
        layers are compiled at. Returns False if there is no such policy.
        """
        costs, room = _at_levels_of(current, self._costs_with(current)), self._room_with(current).device_bytes
        # memory that the prediction leaves unused does not help the run
        unused = max(0, room - fullest_bytes(self._costs_with(current), current, schedule))
        share = round(RELIEF_SHARE * room)
        for tried in range(RELIEF_TRIES):
            problem = self.less(unused + share * (tried + 1))
            solved = solve(costs, problem._room_with(current))
            if solved is None:
                return False
            found = replace(solved.policy, micro_tokens=current.micro_tokens, host_embeddings=current.host_embeddings)
            if current.recompute_layers + current.recompute_mlp_layers == costs.layers:  # its costs have no other level
                found = replace(found, recompute_mlp_layers=costs.layers - found.recompute_layers)
            if (found, problem._schedule(found)) != (current, schedule):
                before = layers.policy  # holds today's micro-batches and embeddings
                problem._apply(layers, found)
                layers.policy = replace(
                    layers.policy, micro_tokens=before.micro_tokens, host_embeddings=before.host_embeddings
                )
                return True
        return False

    def _solution(self) -> Solution | None:
        """Return the fastest policy that fits.

        A policy with all layers at one level is preferred if it is hardly slower.
        """
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
        """Return the mean step's size in micro-batches like the measured one, at least one."""
        return max(self.work.step_tokens / self.tokens, 1.0)


def _at_levels_of(policy: MemoryPolicy, costs: LayerCosts) -> LayerCosts:
    """Return `costs` whose solutions use only the levels of `policy`, if any of them fits."""
    if policy.recompute_layers == costs.layers:
        return replace(costs, kept_bytes=NEVER_BYTES, feed_forward_bytes=NEVER_BYTES)
    if policy.recompute_layers + policy.recompute_mlp_layers == costs.layers:
        costs = costs.without_keeping()
    elif not policy.recompute_mlp_layers:
        costs = replace(costs, recompute_feed_forward_s=UNWANTED_S)
    return costs if policy.recompute_layers else replace(costs, recompute_layer_s=UNWANTED_S)


def smallest_policy(layers: DecoderLayers, longest: int) -> MemoryPolicy:
    """Return the policy that needs least memory.

    Everything is recomputed and offloaded, in micro-batches of the `longest` row.
    """
    whole = len(layers)
    return MemoryPolicy(recompute_layers=whole, offloaded_layers=whole, host_embeddings=True, micro_tokens=longest)


def measured_problem(
    model: Any, layers: DecoderLayers, work: Workload, budget_bytes: int, on_compile: Callable[[], object] | None = None
) -> Problem | None:
    """Measure the first layer and the link, and return the problem of fitting `work`.

    `on_compile` is called right before the layer is compiled. If everything fits `budget_bytes`, `layers` are set to
    keep it, unused memory goes to dequantized weights, and the result is None. Raises TrainingError if a single layer
    does not fit.
    """
    # a layer is measured with all weights dequantized or with none, by the planned policy
    if layers.policy.dequantized_layers < len(layers):
        layers.policy = replace(layers.policy, dequantized_layers=0)
    batch, keep, cheaper = _levels(model, layers, work, on_compile)
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
            dequantized_layers=dequantizable_layers(layers, spare - again), cuda_graph_max_tokens=graphs
        )
        return None
    if layers.policy.dequantized_layers:  # the plan does not fit: dequantize weights on each call
        layers.policy = replace(layers.policy, dequantized_layers=0)
        keep, cheaper = (_with_packed_weights(layers, cost) for cost in (keep, cheaper))
    rates = link_rates()
    room = Room(
        device_bytes=free - round(LOST_SHARE * budget_bytes),
        host_bytes=round(available_bytes() * HOST_SHARE),
        link=Link(*rates),
        embedding_bytes=_movable_bytes(model),
        embedding_s=batch.tokens * _hidden_bytes(model) / rates[1],
        between_s=work.between_bytes / min(rates),
    )
    return Problem(_costs(layers, batch, keep, cheaper, loss_bytes), room, batch.tokens, work)


def _with_packed_weights(layers: DecoderLayers, cost: LevelCost) -> LevelCost:
    """Return the cost of a layer with packed weights, from that of one with dequantized weights."""
    extra_s, weight = dequantize_s(layers), dequantized_bytes(layers)
    return replace(
        cost,
        forward_s=cost.forward_s + extra_s,
        backward_s=cost.backward_s + extra_s,
        working_bytes=cost.working_bytes + weight,
    )


def dequantizable_layers(layers: DecoderLayers, spare_bytes: int) -> int:
    """Return the number of first layers whose dequantized weights fit into `spare_bytes`."""
    sizes = [sum(module.dense_bytes() for module in linears) for linears in layers.frozen]
    return sum(size <= spare_bytes for size in accumulate(sizes)) if any(sizes) else 0


def _levels(
    model: Any, layers: DecoderLayers, work: Workload, on_compile: Callable[[], object] | None
) -> tuple[MicroBatch, LevelCost, LevelCost]:
    """Return the first layer's cost with everything kept, and with its MLP recomputed.

    The level of most layers of the planned policy is measured. The other is predicted if that is exact, because each
    measured level is compiled.
    """
    planned = "feed_forward" if 2 * layers.policy.recompute_mlp_layers >= len(layers) else "keep"
    first = planned if layers.compiled and layers.widths else "keep"
    batch, cost = _measured(model, layers, work, first, on_compile=on_compile)
    if not layers.compiled or not layers.widths:  # without compiling, a family has no such level
        return batch, cost, cost
    products = mlp_matmuls(layers, batch.tokens)
    if products is not None:
        return (batch, cost, products.recomputed(cost)) if first == "keep" else (batch, products.kept(cost), cost)
    other = _measured(model, layers, work, "keep" if first == "feed_forward" else "feed_forward", batch)[1]
    return (batch, cost, other) if first == "keep" else (batch, other, cost)


def _measured(
    model: Any,
    layers: DecoderLayers,
    work: Workload,
    level: str,
    batch: MicroBatch | None = None,
    on_compile: Callable[[], object] | None = None,
) -> tuple[MicroBatch, LevelCost]:
    """Return the first layer's cost at `level` on `batch`, or on the largest micro-batch that fits."""
    tokens = work.max_length
    while True:
        tried = batch or work.batch_of(tokens)
        cost = measure_level(layers, partial(work.loss_of, tried, 1.0), level, on_compile)
        release_memory()
        if cost is not None:
            return tried, cost
        if layers.policy.dequantized_layers:
            layers.policy = replace(layers.policy, dequantized_layers=0)  # less memory than planned
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
    extra_s = max(cheaper.backward_s - keep.backward_s, 0.0)
    stream = batch.ids.numel() * _hidden_bytes(layers.core)
    return LayerCosts(
        layers=len(layers),
        kept_bytes=keep.saved_bytes,
        feed_forward_bytes=cheaper.saved_bytes,
        whole_bytes=min(stream, cheaper.saved_bytes),
        forward_s=keep.forward_s,
        backward_s=keep.backward_s,
        recompute_feed_forward_s=extra_s,
        recompute_layer_s=keep.forward_s,
        kept_working_bytes=keep.working_bytes,
        feed_forward_working_bytes=cheaper.working_bytes,
        whole_working_bytes=keep.working_bytes + keep.saved_bytes - stream,
        fixed_s=dequantize_s(layers),
        launch_s=keep.launch_s,
        fixed_working_bytes=dequantized_bytes(layers),
        loss_bytes=loss_bytes,
        fixed_loss_bytes=min(CHUNK_BYTES, loss_bytes),
        loss_s=_loss_s(layers, batch, keep.forward_s, frozen),
    )


def _loss_s(layers: DecoderLayers, batch: MicroBatch, forward_s: float, frozen: Sequence[nn.Linear]) -> float:
    """Return the seconds of the head's forward and backward matmul, at a layer's matmul rate."""
    weights = sum(module.out_features * module.in_features for module in frozen)
    head = layers.core.get_output_embeddings()
    if not weights or head is None:
        return 0.0
    return 2 * forward_s * batch.supervised / batch.tokens * head.weight.numel() / weights


def _loss_bytes(model: Any, batch: MicroBatch) -> int:
    """Return the bytes of a chunk of logits (two with rows of tokens), of hidden states, and of trained weights."""
    head = model.get_output_embeddings()
    trained = 0 if head is None else gradient_bytes(head)
    return (1 + hasattr(head, "token_rows")) * CHUNK_BYTES + trained + batch.tokens * _hidden_bytes(model) * 4


def _hidden_bytes(model: Any) -> int:
    """Return the bytes of one token's hidden state in 16 bits."""
    return 2 * int(model.config.get_text_config().hidden_size)


def _movable_bytes(model: Any) -> int:
    """Return the bytes of the input embeddings that can move to the host.

    It is 0 if they are tied to the head, trained, or on the host already.
    """
    config = model.config.get_text_config()
    table = getattr(model.get_input_embeddings(), "weight", None)  # None if it is on the host already
    if table is None or config.tie_word_embeddings or table.requires_grad or table.device.type != "cuda":
        return 0
    return int(table.numel() * table.element_size())


def does_not_fit() -> TrainingError:
    """Return the error of a row that fits with no setting."""
    return TrainingError(
        "the longest row does not fit into the GPU's memory or budget, even with everything recomputed and offloaded",
        where="memory",
        fix="shorten the longest rows (--on-long drop), lower rank or targets, or use a larger GPU",
    )
