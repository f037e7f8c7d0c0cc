"""ExecutionPlan: the dial a run goes with, its micro-batch, and what that takes in bytes and seconds.

The engine measures bytes, seconds and the link's rates on the card at hand and solves once more; this is the answer
from data sheets, before anything is loaded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from lorafit.config import RunConfig
from lorafit.planning.activations import Execution, activations, execution_of
from lorafit.planning.dial import Dial, dial_of
from lorafit.planning.dial_solver import Room, solve, solve_micro
from lorafit.planning.facts import DataFacts
from lorafit.planning.graphs import FILLED, graph_tokens
from lorafit.planning.hardware import Hardware
from lorafit.planning.layer_costs import LayerCosts, Link, Moment, Split
from lorafit.planning.micro_batch import MicroBatch, largest_step_tokens, micro_batch, most_tokens_on
from lorafit.planning.rates import layer_costs
from lorafit.planning.shape import ModelShape
from lorafit.planning.standing import WIDTH, compute_of, dense_bytes, movable_embedding_bytes, standing, total_bytes
from lorafit.planning.targets import resolve_targets
from lorafit.planning.timeline import timeline_s

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
    """How a run goes: its dial, the largest micro-batch's size and costs, the device's fullest moment, and the
    predicted seconds of the mean step, of `step_tokens` in `micro_batches`. `kept` and `recomputed`: the fullest
    moments with nothing and everything recomputed, at the same micro-batch. `graph_bytes`: what CUDA graphs hold."""

    dial: Dial
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
    facts: DataFacts,
    execution: Execution | None = None,
) -> ExecutionPlan:
    """The dial that `config` asks for; where it asks for none, the fastest one that fits `hardware` with the
    estimate's error to spare, else without, else the one that needs least. Raises AdapterError for wrong targets.
    """
    dial = dial_of(config, shape.layers) or _fitting(shape, config, hardware, facts, execution)
    batch = micro_batch(config, facts, dial.micro_tokens or config.max_tokens)
    costs = _costs(shape, config, hardware, facts, batch, execution, dial)
    room = room_of(shape, config, hardware, batch.tokens, execution, dial.dense)
    records = _records(dial, shape, config, hardware)
    beside_s = (GRAPH_STEP_S if records else STEP_S) if hardware.kind == "cuda" else 0.0
    plan = _plan(dial, costs, room, batch, config, facts, beside_s)
    return replace(plan, graph_bytes=graph_bytes(costs, dial, batch.tokens)) if records else plan


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
    facts: DataFacts,
    batch: MicroBatch,
    execution: Execution | None,
    dial: Dial = Dial(),  # noqa: B008 (frozen)
) -> LayerCosts:
    execution = execution or execution_of(config, hardware)
    targets = resolve_targets(config.targets, shape)
    width = WIDTH[compute_of(config, hardware)]
    masks = _mask_bytes(config, hardware, width)
    live = activations(shape, targets, batch, width=width, mask_bytes=masks, execution=execution)
    graphs = _records(dial, shape, config, hardware)
    return layer_costs(shape, targets, config, hardware, batch, facts.mean_tokens, live, execution, dial.dense, graphs)


def _mask_bytes(config: RunConfig, hardware: Hardware, width: int) -> int:
    """Bytes of one entry of a dropout mask: CUDA keeps a boolean, a CPU the scaled noise."""
    if not config.dropout:
        return 0
    return width if hardware.kind == "cpu" else 1


def _fitting(
    shape: ModelShape, config: RunConfig, hardware: Hardware, facts: DataFacts, execution: Execution | None
) -> Dial:
    """The dial chosen automatically; it says its micro-batch unless that is `max_tokens`."""
    most = most_tokens_on(hardware, config, facts)
    batch = micro_batch(config, facts, most)
    costs = _costs(shape, config, hardware, facts, batch, execution)
    room = room_of(shape, config, hardware, batch.tokens, execution)
    longest = max(facts.longest, min(LEAST_TOKENS, batch.tokens))
    dial = _fastest(costs, room, shape, hardware, batch.tokens, longest)
    if execution is None and dial.keeps_everything and dial.micro_tokens is None:
        dial = _filling(costs, room, shape, config, hardware, facts, batch)
    return dial.sized(most, config.max_tokens)


def _filling(
    costs: LayerCosts,
    room: Room,
    shape: ModelShape,
    config: RunConfig,
    hardware: Hardware,
    facts: DataFacts,
    batch: MicroBatch,
) -> Dial:
    """What memory that is left over is good for, once everything is kept; nothing is given up for it. Graphs, where
    micro-batches wait for the processor; then unpacked weights."""
    taken = Split(costs, 0, 0).device_bytes(0) * (1 + FRAGMENTATION)
    spared = hardware.memory_bytes * (1 - 1 / (1 + uncertainty_of(shape, hardware)))
    spare = room.device_bytes - spared - taken
    dial = Dial(graphs=_graph_tokens(costs, shape, config, hardware, facts, batch))
    if (again := graph_bytes(costs, dial, batch.tokens)) > spare:
        dial, again = Dial(), 0
    each = dense_bytes(shape, config, hardware, 1)
    filled = replace(dial, dense=max(0, min(shape.layers, int((spare - again) // each))) if each else 0)
    packed, unpacked = (_costs(shape, config, hardware, facts, batch, None, found) for found in (dial, filled))
    # steps that wait for the processor gain by all layers, and by fewer nothing
    worth = Split(packed, 0, 0).work_s > Split(unpacked, 0, 0).work_s * (1 + WORTH_UNPACKING)
    return filled if worth else dial


def _graph_tokens(
    costs: LayerCosts,
    shape: ModelShape,
    config: RunConfig,
    hardware: Hardware,
    facts: DataFacts,
    batch: MicroBatch,
) -> int:
    """Up to how many tokens micro-batches run as CUDA graphs."""
    every = Dial(graphs=batch.tokens)
    if not _records(every, shape, config, hardware):
        return 0
    bare = _costs(shape, config, hardware, facts, batch, None, every)
    card_s = bare.forward_s + bare.backward_s
    return graph_tokens(batch.tokens, card_s, costs.launch_s, _step_tokens(config, facts))


def _records(dial: Dial, shape: ModelShape, config: RunConfig, hardware: Hardware) -> bool:
    """Whether micro-batches run as CUDA graphs where `dial` asks for it: compiled ones in bf16, scores not capped."""
    compiled = execution_of(config, hardware).fused and hardware.kind == "cuda"
    in_half = compute_of(config, hardware) in ("bf16", "fp8")
    return dial.graphs > 0 and dial.takes_graphs and compiled and in_half and not shape.capped_scores


def graph_bytes(costs: LayerCosts, dial: Dial, tokens: int) -> int:
    """Memory of the graphs that `dial` asks for: a second micro-batch, for what runs without them keeps its own.
    `costs` are of a micro-batch of `tokens`."""
    size = Split(costs, 0, dial.feed_forward).device_bytes(0) * (1 + FRAGMENTATION)
    return round(size * FILLED * min(1.0, dial.graphs / tokens))


def _fastest(costs: LayerCosts, room: Room, shape: ModelShape, hardware: Hardware, tokens: int, longest: int) -> Dial:
    """The fastest dial for micro-batches of `tokens` or fewer; `micro_tokens` None means `tokens`."""
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
        if found is None or found.dial != Dial():
            # on a CPU only where nothing else fits: what a small micro-batch costs there is not in the model
            found = solve_micro(costs, usable, tokens=tokens, longest=longest)
        if found:
            return found.dial
    return Dial(
        whole=shape.layers,
        offload=shape.layers if room.link else 0,
        host_embeddings=bool(room.embedding_bytes),
        micro_tokens=longest if longest < tokens else None,
    )


def _plan(
    dial: Dial,
    costs: LayerCosts,
    room: Room,
    batch: MicroBatch,
    config: RunConfig,
    facts: DataFacts,
    beside_s: float,
) -> ExecutionPlan:
    split = Split(costs, dial.whole, dial.whole + dial.feed_forward)
    offload = dial.offload if room.link else 0  # on a CPU there is no other memory to go to
    host = split.saved_by(offload) + (room.embedding_bytes if dial.host_embeddings else 0)
    step_tokens = _step_tokens(config, facts)
    fits_one = largest_step_tokens(config, facts) <= batch.tokens
    count = 1 if fits_one else math.ceil(step_tokens / batch.tokens)
    return ExecutionPlan(
        dial=dial,
        tokens=batch.tokens,
        micro_batches=count,
        costs=costs,
        moment=split.fullest(offload),
        host_bytes=host,
        step_s=beside_s + count * _micro_batch_s(dial, costs, room, step_tokens / count / batch.tokens),
        step_tokens=step_tokens,
        kept=Split(costs, 0, 0).fullest(0),
        recomputed=Split(costs, costs.layers, costs.layers).fullest(0),
    )


def _micro_batch_s(dial: Dial, largest: LayerCosts, room: Room, share: float) -> float:
    """Seconds of a micro-batch with this share of the tokens of the `largest` one, for which the room is."""
    costs = largest.scaled(share)
    if dial.offload and room.link:
        taken = timeline_s(costs, dial, room.link, room.device_bytes)
    else:
        taken = Split(costs, dial.whole, dial.whole + dial.feed_forward).work_s
    return taken + (room.embedding_s * share if dial.host_embeddings else 0.0)


def _step_tokens(config: RunConfig, facts: DataFacts) -> float:
    return max(1.0, min(config.examples_per_step, max(facts.rows, 1)) * facts.mean_tokens)
