"""ExecutionPlan: the policy a run goes with, its micro-batch, and what that takes in bytes and seconds.

The engine measures bytes, seconds and the link's rates on the card at hand and solves once more; this is the answer
from data sheets, before anything is loaded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from lorafit.config import RunConfig
from lorafit.config.memory_policy import MemoryPolicy
from lorafit.hardware.device import Hardware
from lorafit.memory.activations import Execution, activations, execution_of
from lorafit.memory.inputs import DataStats, MicroBatch, largest_step_tokens, micro_batch, most_tokens_on, policy_of
from lorafit.memory.layer_costs import FILLED, LayerCosts, Link, Moment, Split, graph_tokens
from lorafit.memory.solver import Room, solve, solve_micro
from lorafit.memory.speed import layer_costs
from lorafit.memory.static_memory import WIDTH, compute_of, dense_bytes, movable_embedding_bytes, standing, total_bytes
from lorafit.memory.timeline import timeline_s
from lorafit.shapes.shape import ModelShape, resolve_targets

FRAGMENTATION = 0.05
"""Share of what comes and goes that the allocator loses between blocks."""
UNCERTAINTY, UNCERTAINTY_ELSEWHERE = 0.10, 0.30
"""Half-width of the memory estimate. 17 runs of eager layers (Llama 1B and 8B, Qwen 3, Gemma 2, Phi 3; with and without
recomputation) lay within it on an H200; CPUs and families without a gated feed-forward were only counted."""
STEP_S = 0.0095
"""Seconds of each optimizer step on a card beside its micro-batches: clipping, the optimizer, what the Trainer does
before the next one starts. Of an H200 (8B, 2026-11-22): a step less its kernels."""
GRAPH_STEP_S = 0.0015
"""The same where micro-batches are CUDA graphs: the processor does the rest while the card computes. Of the same card:
a step of 1,024 tokens of 1B, 11.7 ms, less its kernels."""
WORTH_UNPACKING = 0.005
"""Predicted gain in speed below which spare memory is left alone."""
LEAST_TOKENS = 128
"""The smallest micro-batch worth its kernel starts."""


@dataclass(frozen=True, slots=True)
class ExecutionPlan:
    """How a run goes: its policy, the largest micro-batch's size and costs, the device's fullest moment, and the
    predicted seconds of the mean step, of `step_tokens` in `micro_batches`. `kept` and `recomputed`: the fullest
    moments with nothing and everything recomputed, at the same micro-batch. `graph_bytes`: what CUDA graphs hold."""

    policy: MemoryPolicy
    tokens: int
    micro_batches: int
    costs: LayerCosts
    moment: Moment
    host_bytes: int
    step_s: float
    step_tokens: float
    kept: Moment
    recomputed: Moment
    graph_bytes: int = 0

    @property
    def tokens_per_s(self) -> float:
        """Predicted speed of training."""
        return self.step_tokens / self.step_s


def plan_execution(
    shape: ModelShape,
    config: RunConfig,
    hardware: Hardware,
    facts: DataStats,
    execution: Execution | None = None,
) -> ExecutionPlan:
    """The policy that `config` asks for; where it asks for none, the fastest one that fits `hardware` with the
    estimate's error to spare, else without, else the one that needs least. Raises AdapterError for wrong targets.
    """
    policy = policy_of(config, shape.layers) or _fitting(shape, config, hardware, facts, execution)
    batch = micro_batch(config, facts, policy.micro_tokens or config.max_tokens)
    costs = _costs(shape, config, hardware, facts, batch, execution, policy)
    room = room_of(shape, config, hardware, batch.tokens, execution, policy.dequantized_layers)
    records = _records(policy, shape, config, hardware)
    beside_s = (GRAPH_STEP_S if records else STEP_S) if hardware.kind == "cuda" else 0.0
    plan = _plan(policy, costs, room, batch, config, facts, beside_s)
    return replace(plan, graph_bytes=graph_bytes(costs, policy, batch.tokens)) if records else plan


def uncertainty_of(shape: ModelShape, hardware: Hardware) -> float:
    """Half-width of the memory estimate for such a model there."""
    measured = shape.exact and shape.is_gated and hardware.kind == "cuda"
    return UNCERTAINTY if measured else UNCERTAINTY_ELSEWHERE


def room_of(
    shape: ModelShape,
    config: RunConfig,
    hardware: Hardware,
    tokens: int,
    execution: Execution | None = None,
    dense: int = 0,
) -> Room:
    """What is left for activations beside everything that stays, on the device and in host memory; `tokens` of one
    micro-batch are what embeddings on the host are read for, `dense` layers have their weights unpacked."""
    targets = resolve_targets(config.targets, shape)
    wide = execution is not None and execution.wide_stream
    stays = total_bytes(standing(shape, targets, config, hardware, wide=wide, dense=dense))
    rate = hardware.link_gbs * 1e9
    width = WIDTH[compute_of(config, hardware)]
    return Room(
        device_bytes=hardware.memory_bytes - stays,
        host_bytes=hardware.host_bytes,
        link=Link(rate, rate) if hardware.kind == "cuda" and rate else None,
        embedding_bytes=movable_embedding_bytes(shape, config, hardware),
        embedding_s=tokens * shape.hidden * width / rate if rate else 0.0,
    )


def _costs(
    shape: ModelShape,
    config: RunConfig,
    hardware: Hardware,
    facts: DataStats,
    batch: MicroBatch,
    execution: Execution | None,
    policy: MemoryPolicy = MemoryPolicy(),  # noqa: B008 (frozen)
) -> LayerCosts:
    execution = execution or execution_of(config, hardware)
    targets = resolve_targets(config.targets, shape)
    width = WIDTH[compute_of(config, hardware)]
    masks = _mask_bytes(config, hardware, width)
    live = activations(shape, targets, batch, width=width, mask_bytes=masks, execution=execution)
    graphs = _records(policy, shape, config, hardware)
    return layer_costs(
        shape, targets, config, hardware, batch, facts.mean_tokens, live, execution, policy.dequantized_layers, graphs
    )


def _mask_bytes(config: RunConfig, hardware: Hardware, width: int) -> int:
    """Bytes of one entry of a dropout mask: CUDA keeps a boolean, a CPU the scaled noise."""
    if not config.dropout:
        return 0
    return width if hardware.kind == "cpu" else 1


def _fitting(
    shape: ModelShape, config: RunConfig, hardware: Hardware, facts: DataStats, execution: Execution | None
) -> MemoryPolicy:
    """The policy chosen automatically; it says its micro-batch unless that is `max_tokens`."""
    most = most_tokens_on(hardware, config, facts)
    batch = micro_batch(config, facts, most)
    costs = _costs(shape, config, hardware, facts, batch, execution)
    room = room_of(shape, config, hardware, batch.tokens, execution)
    longest = max(facts.longest, min(LEAST_TOKENS, batch.tokens))
    policy = _fastest(costs, room, shape, hardware, batch.tokens, longest)
    if execution is None and policy.keeps_everything and policy.micro_tokens is None:
        policy = _filling(costs, room, shape, config, hardware, facts, batch)
    return policy.sized(most, config.max_tokens)


def _filling(
    costs: LayerCosts,
    room: Room,
    shape: ModelShape,
    config: RunConfig,
    hardware: Hardware,
    facts: DataStats,
    batch: MicroBatch,
) -> MemoryPolicy:
    """What memory that is left over is good for, once everything is kept; nothing is given up for it. Graphs, where
    micro-batches wait for the processor; then unpacked weights."""
    taken = Split(costs, 0, 0).device_bytes(0) * (1 + FRAGMENTATION)
    spared = hardware.memory_bytes * (1 - 1 / (1 + uncertainty_of(shape, hardware)))
    spare = room.device_bytes - spared - taken
    policy = MemoryPolicy(cuda_graph_max_tokens=_graph_tokens(costs, shape, config, hardware, facts, batch))
    if (again := graph_bytes(costs, policy, batch.tokens)) > spare:
        policy, again = MemoryPolicy(), 0
    each = dense_bytes(shape, config, hardware, 1)
    filled = replace(policy, dequantized_layers=max(0, min(shape.layers, int((spare - again) // each))) if each else 0)
    packed, unpacked = (_costs(shape, config, hardware, facts, batch, None, found) for found in (policy, filled))
    # steps that wait for the processor gain by all layers, and by fewer nothing
    worth = Split(packed, 0, 0).work_s > Split(unpacked, 0, 0).work_s * (1 + WORTH_UNPACKING)
    return filled if worth else policy


def _graph_tokens(
    costs: LayerCosts,
    shape: ModelShape,
    config: RunConfig,
    hardware: Hardware,
    facts: DataStats,
    batch: MicroBatch,
) -> int:
    """Up to how many tokens micro-batches run as CUDA graphs."""
    every = MemoryPolicy(cuda_graph_max_tokens=batch.tokens)
    if not _records(every, shape, config, hardware):
        return 0
    bare = _costs(shape, config, hardware, facts, batch, None, every)
    card_s = bare.forward_s + bare.backward_s
    return graph_tokens(batch.tokens, card_s, costs.launch_s, _step_tokens(config, facts))


def _records(policy: MemoryPolicy, shape: ModelShape, config: RunConfig, hardware: Hardware) -> bool:
    """Whether micro-batches run as CUDA graphs where `policy` asks for it: compiled ones in bf16, scores not capped."""
    compiled = execution_of(config, hardware).fused and hardware.kind == "cuda"
    in_half = compute_of(config, hardware) in ("bf16", "fp8")
    return policy.cuda_graph_max_tokens > 0 and policy.takes_graphs and compiled and in_half and not shape.capped_scores


def graph_bytes(costs: LayerCosts, policy: MemoryPolicy, tokens: int) -> int:
    """Memory of the graphs that `policy` asks for: a second micro-batch, for what runs without them keeps its own.
    `costs` are of a micro-batch of `tokens`."""
    size = Split(costs, 0, policy.recompute_mlp_layers).device_bytes(0) * (1 + FRAGMENTATION)
    return round(size * FILLED * min(1.0, policy.cuda_graph_max_tokens / tokens))


def _fastest(
    costs: LayerCosts, room: Room, shape: ModelShape, hardware: Hardware, tokens: int, longest: int
) -> MemoryPolicy:
    """The fastest policy for micro-batches of `tokens` or fewer; `micro_tokens` None means `tokens`."""
    for margin in (uncertainty_of(shape, hardware), 0.0):
        spared = hardware.memory_bytes * (1 - 1 / (1 + margin))
        embeddings = int(room.embedding_bytes / (1 + FRAGMENTATION))
        usable = replace(
            room,
            device_bytes=int((room.device_bytes - spared) / (1 + FRAGMENTATION)),
            embedding_bytes=embeddings,
            # on the host they are as large as they are: nothing is lost between blocks there
            host_bytes=room.host_bytes - (room.embedding_bytes - embeddings),
        )
        found = solve(costs, usable) if hardware.kind == "cpu" else None
        if found is None or found.policy != MemoryPolicy():
            # on a CPU only where nothing else fits: what a small micro-batch costs there is not in the model
            found = solve_micro(costs, usable, tokens=tokens, longest=longest)
        if found:
            return found.policy
    return MemoryPolicy(
        recompute_layers=shape.layers,
        offloaded_layers=shape.layers if room.link else 0,
        host_embeddings=bool(room.embedding_bytes),
        micro_tokens=longest if longest < tokens else None,
    )


def _plan(
    policy: MemoryPolicy,
    costs: LayerCosts,
    room: Room,
    batch: MicroBatch,
    config: RunConfig,
    facts: DataStats,
    beside_s: float,
) -> ExecutionPlan:
    split = Split(costs, policy.recompute_layers, policy.recompute_layers + policy.recompute_mlp_layers)
    offload = policy.offloaded_layers if room.link else 0  # on a CPU there is no other memory to go to
    host = split.saved_by(offload) + (room.embedding_bytes if policy.host_embeddings else 0)
    step_tokens = _step_tokens(config, facts)
    fits_one = largest_step_tokens(config, facts) <= batch.tokens
    count = 1 if fits_one else math.ceil(step_tokens / batch.tokens)
    return ExecutionPlan(
        policy=policy,
        tokens=batch.tokens,
        micro_batches=count,
        costs=costs,
        moment=split.fullest(offload),
        host_bytes=host,
        step_s=beside_s + count * _micro_batch_s(policy, costs, room, step_tokens / count / batch.tokens),
        step_tokens=step_tokens,
        kept=Split(costs, 0, 0).fullest(0),
        recomputed=Split(costs, costs.layers, costs.layers).fullest(0),
    )


def _micro_batch_s(policy: MemoryPolicy, largest: LayerCosts, room: Room, share: float) -> float:
    """Seconds of a micro-batch with this share of the tokens of the `largest` one, for which the room is."""
    costs = largest.scaled(share)
    if policy.offloaded_layers and room.link:
        taken = timeline_s(costs, policy, room.link, room.device_bytes)
    else:
        taken = Split(costs, policy.recompute_layers, policy.recompute_layers + policy.recompute_mlp_layers).work_s
    return taken + (room.embedding_s * share if policy.host_embeddings else 0.0)


def _step_tokens(config: RunConfig, facts: DataStats) -> float:
    return max(1.0, min(config.examples_per_step, max(facts.rows, 1)) * facts.mean_tokens)
