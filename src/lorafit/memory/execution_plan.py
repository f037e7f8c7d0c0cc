"""ExecutionPlan and estimate_memory: the policy a run gets, its micro-batch, and what both take."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from lorafit.config.memory_policy import MemoryPolicy
from lorafit.hardware import Hardware
from lorafit.memory.footprint import (
    Component,
    Execution,
    activations,
    dense_bytes,
    execution_of,
    movable_embedding_bytes,
    static_memory,
    total_bytes,
)
from lorafit.memory.inputs import MicroBatch, PlanInputs
from lorafit.memory.layer_costs import FILLED, LayerCosts, Link, Moment, Split, graph_tokens, timeline_s
from lorafit.memory.solver import Room, solve, solve_micro
from lorafit.memory.speed import layer_costs

FRAGMENTATION = 0.05
"""Share of what comes and goes that the allocator loses between blocks."""
UNCERTAINTY, UNCERTAINTY_ELSEWHERE = 0.10, 0.30
"""Half-width of the memory estimate. 17 runs of eager layers (Llama 1B and 8B, Qwen 3, Gemma 2, Phi 3; with and without
recomputation) lay within it on an H200; CPUs and families without a gated feed-forward were only counted."""
STEP_S = 0.0095
"""Seconds of each optimizer step on a GPU beside its micro-batches: clipping, the optimizer, what the Trainer does
before the next one starts. Of an H200 (8B, 2026-11-22): a step less its kernels."""
GRAPH_STEP_S = 0.0015
"""The same where micro-batches are CUDA graphs: the processor does the rest while the GPU computes. Of the same GPU:
a step of 1,024 tokens of 1B, 11.7 ms, less its kernels."""
WORTH_UNPACKING = 0.005
"""Predicted gain in speed below which spare memory is left alone."""
LEAST_TOKENS = 128
"""The smallest micro-batch worth its kernel starts."""


@dataclass(frozen=True, slots=True)
class ExecutionPlan:
    """Hold how a run goes.

    Attributes:
        policy: Memory policy.
        tokens: Tokens of the largest micro-batch.
        micro_batches: Micro-batches of the mean step.
        costs: Bytes and seconds of one layer for the largest micro-batch.
        moment: The device's fullest moment.
        host_bytes: Bytes pinned in host memory.
        step_s: Predicted seconds of the mean step.
        step_tokens: Tokens of the mean step.
        kept: The fullest moment with nothing recomputed, at the same micro-batch.
        recomputed: The fullest moment with everything recomputed, at the same micro-batch.
        graph_bytes: Bytes that CUDA graphs hold.
    """

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


def plan_execution(inputs: PlanInputs, execution: Execution | None = None) -> ExecutionPlan:
    """Return the plan of the policy that the settings ask for, else of the fastest one that fits.

    It fits with the estimate's error to spare, else without. Where nothing fits, the plan is that of the smallest
    policy. Raises AdapterError for wrong targets.
    """
    policy = inputs.policy or _fitting(inputs, execution)
    batch = inputs.micro_batch(policy.micro_tokens or inputs.config.max_length)
    costs = _costs(inputs, batch, execution, policy)
    room = room_of(inputs, batch.tokens, execution, policy.dequantized_layers)
    records = _records(policy, inputs)
    beside_s = (GRAPH_STEP_S if records else STEP_S) if inputs.on_cuda else 0.0
    plan = _plan(policy, costs, room, batch, inputs, beside_s)
    return replace(plan, graph_bytes=graph_bytes(costs, policy, batch.tokens)) if records else plan


def uncertainty_of(inputs: PlanInputs) -> float:
    """Return the half-width of the memory estimate for such a model on such a device."""
    shape = inputs.shape
    measured = shape.exact and not shape.counted and shape.is_gated and inputs.on_cuda
    return UNCERTAINTY if measured else UNCERTAINTY_ELSEWHERE


def room_of(inputs: PlanInputs, tokens: int, execution: Execution | None = None, dequantized_layers: int = 0) -> Room:
    """Return the room for activations beside static memory, on the device and in host memory.

    Embeddings in host memory are read for micro-batches of `tokens`.
    """
    wide = execution is not None and execution.wide_stream
    stays = total_bytes(static_memory(inputs, wide=wide, dequantized_layers=dequantized_layers))
    rate = inputs.hardware.link_gbs * 1e9
    return Room(
        device_bytes=inputs.hardware.memory_bytes - stays,
        host_bytes=inputs.hardware.host_bytes,
        link=Link(rate, rate) if inputs.on_cuda and rate else None,
        embedding_bytes=movable_embedding_bytes(inputs),
        embedding_s=tokens * inputs.shape.hidden * inputs.width / rate if rate else 0.0,
    )


def _costs(
    inputs: PlanInputs,
    batch: MicroBatch,
    execution: Execution | None,
    policy: MemoryPolicy = MemoryPolicy(),  # noqa: B008 (frozen)
) -> LayerCosts:
    execution = execution or execution_of(inputs)
    live = activations(
        inputs.shape,
        inputs.targets,
        batch,
        width=inputs.width,
        mask_bytes=_mask_bytes(inputs),
        execution=execution,
    )
    return layer_costs(inputs, batch, live, execution, policy, graphs=_records(policy, inputs))


def _mask_bytes(inputs: PlanInputs) -> int:
    """Return the bytes of one entry of a dropout mask: CUDA keeps a boolean, a CPU the scaled noise."""
    if not inputs.config.dropout:
        return 0
    return 1 if inputs.on_cuda else inputs.width


def _fitting(inputs: PlanInputs, execution: Execution | None) -> MemoryPolicy:
    """Return the policy chosen automatically; it says its micro-batch unless that is `max_length`."""
    most = inputs.most_tokens
    batch = inputs.micro_batch(most)
    costs = _costs(inputs, batch, execution)
    room = room_of(inputs, batch.tokens, execution)
    policy = _fastest(costs, room, inputs, batch.tokens)
    if execution is None and policy.keeps_everything and policy.micro_tokens is None:
        policy = _filling(costs, room, inputs, batch)
    return policy.sized(most, inputs.config.max_length)


def _filling(costs: LayerCosts, room: Room, inputs: PlanInputs, batch: MicroBatch) -> MemoryPolicy:
    """Return the policy that fills unused memory, once everything is kept, and gives up nothing for it.

    CUDA graphs come first, where micro-batches wait for the processor; then dequantized weights.
    """
    taken = Split(costs, 0, 0).device_bytes(0) * (1 + FRAGMENTATION)
    spare = room.device_bytes - _spared_bytes(inputs, uncertainty_of(inputs)) - taken
    policy = MemoryPolicy(cuda_graph_max_tokens=_graph_tokens(costs, inputs, batch))
    if (again := graph_bytes(costs, policy, batch.tokens)) > spare:
        policy, again = MemoryPolicy(), 0
    each = dense_bytes(inputs, 1)
    layers = max(0, min(inputs.shape.layers, int((spare - again) // each))) if each else 0
    filled = replace(policy, dequantized_layers=layers)
    packed, unpacked = (_costs(inputs, batch, None, found) for found in (policy, filled))
    # steps that wait for the processor gain by all layers, and by fewer nothing
    worth = Split(packed, 0, 0).work_s > Split(unpacked, 0, 0).work_s * (1 + WORTH_UNPACKING)
    return filled if worth else policy


def _spared_bytes(inputs: PlanInputs, margin: float) -> float:
    """Return the memory left free for an estimate that is wrong by `margin`."""
    return inputs.hardware.memory_bytes * (1 - 1 / (1 + margin))


def _graph_tokens(costs: LayerCosts, inputs: PlanInputs, batch: MicroBatch) -> int:
    """Return up to how many tokens micro-batches run as CUDA graphs."""
    every = MemoryPolicy(cuda_graph_max_tokens=batch.tokens)
    if not _records(every, inputs):
        return 0
    bare = _costs(inputs, batch, None, every)
    gpu_s = bare.forward_s + bare.backward_s
    return graph_tokens(batch.tokens, gpu_s, costs.launch_s, inputs.mean_step_tokens)


def _records(policy: MemoryPolicy, inputs: PlanInputs) -> bool:
    """True where `policy` asks for CUDA graphs and compiled layers in 16 bits without capped scores can run them."""
    compiled = execution_of(inputs).fused and inputs.on_cuda
    able = compiled and inputs.compute in ("bf16", "fp8") and not inputs.shape.capped_scores
    return policy.cuda_graph_max_tokens > 0 and policy.takes_graphs and able


def graph_bytes(costs: LayerCosts, policy: MemoryPolicy, tokens: int) -> int:
    """Return the memory of the CUDA graphs of `policy`, given the costs of a micro-batch of `tokens`.

    It is a second micro-batch, because micro-batches that run without graphs keep their own.
    """
    size = Split(costs, 0, policy.recompute_mlp_layers).device_bytes(0) * (1 + FRAGMENTATION)
    return round(size * FILLED * min(1.0, policy.cuda_graph_max_tokens / tokens))


def _fastest(costs: LayerCosts, room: Room, inputs: PlanInputs, tokens: int) -> MemoryPolicy:
    """Return the fastest policy for micro-batches of at most `tokens`; `micro_tokens` None means `tokens`."""
    longest = max(inputs.stats.longest, min(LEAST_TOKENS, tokens))
    for margin in (uncertainty_of(inputs), 0.0):
        embeddings = int(room.embedding_bytes / (1 + FRAGMENTATION))
        usable = replace(
            room,
            device_bytes=int((room.device_bytes - _spared_bytes(inputs, margin)) / (1 + FRAGMENTATION)),
            embedding_bytes=embeddings,
            # on the host they are as large as they are: nothing is lost between blocks there
            host_bytes=room.host_bytes - (room.embedding_bytes - embeddings),
        )
        found = None if inputs.on_cuda else solve(costs, usable)
        if found is None or found.policy != MemoryPolicy():
            # on a CPU only where nothing else fits: what a small micro-batch costs there is not in the model
            found = solve_micro(costs, usable, tokens=tokens, longest=longest)
        if found:
            return found.policy
    layers = inputs.shape.layers
    return MemoryPolicy(
        recompute_layers=layers,
        offloaded_layers=layers if room.link else 0,
        host_embeddings=bool(room.embedding_bytes),
        micro_tokens=longest if longest < tokens else None,
    )


def _plan(
    policy: MemoryPolicy, costs: LayerCosts, room: Room, batch: MicroBatch, inputs: PlanInputs, beside_s: float
) -> ExecutionPlan:
    split = Split.of(policy, costs)
    offloaded = policy.offloaded_layers if room.link else 0  # on a CPU there is no other memory to go to
    step_tokens = inputs.mean_step_tokens
    fits_one = inputs.largest_step_tokens <= batch.tokens
    count = 1 if fits_one else math.ceil(step_tokens / batch.tokens)
    return ExecutionPlan(
        policy=policy,
        tokens=batch.tokens,
        micro_batches=count,
        costs=costs,
        moment=split.fullest(offloaded),
        host_bytes=split.saved_by(offloaded) + (room.embedding_bytes if policy.host_embeddings else 0),
        step_s=beside_s + count * _micro_batch_s(policy, costs, room, step_tokens / count / batch.tokens),
        step_tokens=step_tokens,
        kept=Split(costs, 0, 0).fullest(0),
        recomputed=Split(costs, costs.layers, costs.layers).fullest(0),
    )


def _micro_batch_s(policy: MemoryPolicy, largest: LayerCosts, room: Room, share: float) -> float:
    """Return the seconds of a micro-batch with this share of the tokens of the `largest` one; the room is for that."""
    costs = largest.scaled(share)
    if policy.offloaded_layers and room.link:
        taken = timeline_s(costs, policy, room.link, room.device_bytes)
    else:
        taken = Split.of(policy, costs).work_s
    return taken + (room.embedding_s * share if policy.host_embeddings else 0.0)


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Hold the peak and its components; the true peak lies within ± `uncertainty` of it.

    `kept_bytes` and `recomputed_bytes` are the peak with every activation kept and with all of them recomputed, at
    the same micro-batch. `host_bytes` are pinned in the host's memory meanwhile.
    """

    components: tuple[Component, ...]
    kept_bytes: int
    recomputed_bytes: int
    uncertainty: float
    host_bytes: int = 0

    @property
    def peak_bytes(self) -> int:
        """The sum of the components."""
        return total_bytes(self.components)

    @property
    def needed_bytes(self) -> int:
        """The peak without what only fills room to spare."""
        return total_bytes(part for part in self.components if not part.spare)

    def fits(self, hardware: Hardware) -> bool:
        """True when the expected peak is within the device's memory, or the budget set for it."""
        return self.peak_bytes <= hardware.memory_bytes

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready mapping."""
        return {
            "peak_bytes": self.peak_bytes,
            "uncertainty": self.uncertainty,
            "kept_bytes": self.kept_bytes,
            "recomputed_bytes": self.recomputed_bytes,
            "host_bytes": self.host_bytes,
            "components": [
                {"name": part.name, "bytes": part.size_bytes, "assumes": part.assumes} for part in self.components
            ],
        }


def estimate_memory(inputs: PlanInputs, execution: Execution | None = None) -> MemoryEstimate:
    """Return the peak memory of training in packed micro-batches.

    The memory policy is that of the settings; on auto, the plan's. `execution` stands for another way to run the
    layers than lorafit's. Raises AdapterError for wrong targets.
    """
    return memory_of(plan_execution(inputs, execution), inputs, execution)


def memory_of(plan: ExecutionPlan, inputs: PlanInputs, execution: Execution | None = None) -> MemoryEstimate:
    """Return the peak memory of a run that goes as `plan` says."""
    wide = execution is not None and execution.wide_stream
    policy = plan.policy
    stays = static_memory(
        inputs, wide=wide, host_embeddings=policy.host_embeddings, dequantized_layers=policy.dequantized_layers
    )
    everything = total_bytes(static_memory(inputs, wide=wide))
    return MemoryEstimate(
        components=(*stays, *_passing(plan.moment, policy, plan.tokens, inputs.shape.layers), *_of_graphs(plan)),
        kept_bytes=everything + _passing_bytes(plan.kept),
        recomputed_bytes=everything + _passing_bytes(plan.recomputed),
        uncertainty=uncertainty_of(inputs),
        host_bytes=plan.host_bytes,
    )


def _passing(moment: Moment, policy: MemoryPolicy, tokens: int, layers: int) -> list[Component]:
    size = moment.stays_bytes + moment.in_flight_bytes + moment.working_bytes
    parts = [
        Component(
            "activations", moment.stays_bytes, f"one micro-batch of {tokens:,} tokens: {kept_in_words(policy, layers)}"
        ),
        Component(
            "activations in flight",
            moment.in_flight_bytes,
            "two layers on their way to or from the host; more where there is room",
        ),
        Component("loss or one layer's backward", moment.working_bytes, "the larger of the two, at the fullest moment"),
        Component("fragmentation", round(FRAGMENTATION * size), f"{FRAGMENTATION:.0%} of what comes and goes"),
    ]
    return [part for part in parts if part.size_bytes or part.name != "activations in flight"]


def _of_graphs(plan: ExecutionPlan) -> list[Component]:
    if not plan.graph_bytes:
        return []
    why = "the activations of micro-batches that are recorded, beside those of others"
    return [Component("CUDA graphs", plan.graph_bytes, why, spare=True)]


def _passing_bytes(moment: Moment) -> int:
    return total_bytes(_passing(moment, MemoryPolicy(), 0, 0))


def kept_in_words(policy: MemoryPolicy, layers: int) -> str:
    """Say what a policy keeps on the device of each layer."""
    if policy.offloaded_layers:
        return f"what {layers - policy.offloaded_layers} of {layers} layers keep there until their backward pass"
    if policy.recompute_layers == layers:
        return "each layer's input; the rest is recomputed"
    parts = [
        f"of {policy.recompute_layers} layers their input" if policy.recompute_layers else "",
        f"of {policy.recompute_mlp_layers} all but their feed-forward" if policy.recompute_mlp_layers else "",
    ]
    said = ", ".join(part for part in parts if part)
    return f"{said}, of the rest everything" if said else "everything the backward pass needs"
