"""ExecutionPlan: the dial a run goes with, its micro-batch, and what that takes in bytes and seconds.

The engine measures bytes, seconds and the link's rates on the card at hand and solves once more; this is the answer
from data sheets, before anything is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from lorafit.config import RunConfig
from lorafit.planning.activations import Execution, MicroBatch, activations, execution_of, micro_batch
from lorafit.planning.dial import Dial, dial_of
from lorafit.planning.dial_solver import Room, solve, solve_micro
from lorafit.planning.facts import DataFacts
from lorafit.planning.hardware import Hardware
from lorafit.planning.layer_costs import LayerCosts, Link, Moment, Split
from lorafit.planning.rates import layer_costs
from lorafit.planning.shape import ModelShape
from lorafit.planning.standing import WIDTH, compute_of, movable_embedding_bytes, standing, total_bytes
from lorafit.planning.targets import resolve_targets
from lorafit.planning.timeline import timeline_s

FRAGMENTATION = 0.05
"""Share of what comes and goes that the allocator loses between blocks."""
UNCERTAINTY, UNCERTAINTY_ELSEWHERE = 0.10, 0.30
"""Half-width of the memory estimate. 17 runs of eager layers (Llama 1B and 8B, Qwen 3, Gemma 2, Phi 3; with and without
recomputation) lay within it on an H200; CPUs and families without a gated feed-forward were only counted."""
LEAST_TOKENS = 128
"""The smallest micro-batch worth its kernel starts."""


@dataclass(frozen=True, slots=True)
class ExecutionPlan:
    """How a run goes: its dial, one micro-batch's size and costs, the device's fullest moment, and the predicted
    seconds of a step of `step_tokens`. `kept` and `recomputed`: the fullest moments with nothing and everything
    recomputed, at the largest micro-batch."""

    dial: Dial
    tokens: int
    costs: LayerCosts
    moment: Moment
    host_bytes: int
    step_s: float
    step_tokens: float
    kept: Moment
    recomputed: Moment

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
    batch = micro_batch(config, facts)
    costs = _costs(shape, config, hardware, facts, batch, execution or execution_of(config, hardware))
    room = room_of(shape, config, hardware, execution)
    longest = max(facts.longest, min(LEAST_TOKENS, batch.tokens))
    dial = dial_of(config, shape.layers) or _fitting(costs, room, shape, hardware, batch, longest)
    return _plan(dial, costs, room, batch, _step_tokens(config, facts))


def uncertainty_of(shape: ModelShape, hardware: Hardware) -> float:
    """Half-width of the memory estimate for such a model there."""
    measured = shape.exact and shape.is_gated and hardware.kind == "cuda"
    return UNCERTAINTY if measured else UNCERTAINTY_ELSEWHERE


def room_of(shape: ModelShape, config: RunConfig, hardware: Hardware, execution: Execution | None = None) -> Room:
    """What is left for activations beside everything that stays, on the device and in host memory."""
    targets = resolve_targets(config.targets, shape)
    wide = execution is not None and execution.wide_stream
    stays = total_bytes(standing(shape, targets, config, hardware, wide=wide))
    rate = hardware.link_gbs * 1e9
    width = WIDTH[compute_of(config, hardware)]
    return Room(
        device_bytes=hardware.memory_bytes - stays,
        host_bytes=hardware.host_bytes,
        link=Link(rate, rate) if hardware.kind == "cuda" and rate else None,
        embedding_bytes=movable_embedding_bytes(shape, config, hardware),
        embedding_s=config.max_tokens * shape.hidden * width / rate if rate else 0.0,
    )


def _costs(
    shape: ModelShape,
    config: RunConfig,
    hardware: Hardware,
    facts: DataFacts,
    batch: MicroBatch,
    execution: Execution,
) -> LayerCosts:
    targets = resolve_targets(config.targets, shape)
    width = WIDTH[compute_of(config, hardware)]
    masks = _mask_bytes(config, hardware, width)
    live = activations(shape, targets, batch, width=width, mask_bytes=masks, execution=execution)
    return layer_costs(shape, targets, config, hardware, batch, facts.mean_tokens, live, execution)


def _mask_bytes(config: RunConfig, hardware: Hardware, width: int) -> int:
    """Bytes of one entry of a dropout mask: CUDA keeps a boolean, a CPU the scaled noise."""
    if not config.dropout:
        return 0
    return width if hardware.kind == "cpu" else 1


def _fitting(
    costs: LayerCosts, room: Room, shape: ModelShape, hardware: Hardware, batch: MicroBatch, longest: int
) -> Dial:
    for margin in (uncertainty_of(shape, hardware), 0.0):
        spared = hardware.memory_bytes * (1 - 1 / (1 + margin))
        usable = replace(
            room,
            device_bytes=int((room.device_bytes - spared) / (1 + FRAGMENTATION)),
            embedding_bytes=int(room.embedding_bytes / (1 + FRAGMENTATION)),
        )
        found = solve(costs, usable) if hardware.kind == "cpu" else None
        if found is None or found.dial != Dial():
            # on a CPU only where nothing else fits: what a small micro-batch costs there is not in the model
            found = solve_micro(costs, usable, tokens=batch.tokens, longest=longest)
        if found:
            return found.dial
    return Dial(
        whole=shape.layers,
        offload=shape.layers if room.link else 0,
        host_embeddings=bool(room.embedding_bytes),
        micro_tokens=longest if longest < batch.tokens else None,
    )


def _plan(dial: Dial, full: LayerCosts, room: Room, batch: MicroBatch, step_tokens: float) -> ExecutionPlan:
    tokens = min(dial.micro_tokens or batch.tokens, batch.tokens)
    costs = full.scaled(tokens / batch.tokens)
    split = Split(costs, dial.whole, dial.whole + dial.feed_forward)
    offload = dial.offload if room.link else 0  # on a CPU there is no other memory to go to
    link = room.link if offload else None
    host = split.saved_by(offload) + (room.embedding_bytes if dial.host_embeddings else 0)
    taken = timeline_s(costs, dial, link, room.device_bytes) if link else split.work_s
    taken += room.embedding_s * tokens / batch.tokens if dial.host_embeddings else 0.0
    return ExecutionPlan(
        dial=dial,
        tokens=tokens,
        costs=costs,
        moment=split.fullest(offload),
        host_bytes=host,
        step_s=taken * step_tokens / tokens,
        step_tokens=step_tokens,
        kept=Split(full, 0, 0).fullest(0),
        recomputed=Split(full, full.layers, full.layers).fullest(0),
    )


def _step_tokens(config: RunConfig, facts: DataFacts) -> float:
    return max(1.0, min(config.examples_per_step, max(facts.rows, 1)) * facts.mean_tokens)
