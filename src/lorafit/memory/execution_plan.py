"""ExecutionPlan: the memory policy and micro-batch of a run, with their memory and time."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from lorafit.config.memory_policy import MemoryPolicy
from lorafit.hardware import Hardware
from lorafit.memory.footprint import (
    Component,
    Execution,
    Trained,
    activations,
    dense_bytes,
    execution_of,
    movable_embedding_bytes,
    static_memory,
    total_bytes,
)
from lorafit.memory.inputs import MicroBatchSize, PlanInputs
from lorafit.memory.layer_costs import FILLED, LayerCosts, Link, PeakMemory, Split, graph_tokens, timeline_s
from lorafit.memory.recurrent_layers import with_recurrent_layers
from lorafit.memory.solver import Room, solve, solve_micro
from lorafit.memory.speed import layer_costs, optimizer_s

FRAGMENTATION = 0.05
"""Share of activations and working memory that the allocator loses between blocks."""
UNCERTAINTY, UNCERTAINTY_ELSEWHERE = 0.10, 0.30
"""Half-width of the memory estimate. 17 runs of eager layers (Llama 1B and 8B, Qwen 3, Gemma 2, Phi 3; with and without
recompute) lay within it on an H200; CPUs and families without a gated feed-forward are estimated, not measured."""
STEP_S = 0.0095
"""Seconds of each optimizer step on a GPU beside its micro-batches. They go to clipping, the optimizer, and the
trainer's work before the next step. Measured on an H200 (8B, 2026-11-22) as a step less its kernels."""
GRAPH_STEP_S = 0.0015
"""The same for micro-batches in CUDA graphs. The CPU does that work while the GPU computes. Measured on the same GPU as
a step of 1,024 tokens of 1B, 11.7 ms, less its kernels."""
LEAST_TOKENS = 128
"""Smallest micro-batch whose speed justifies its kernel launches."""


@dataclass(frozen=True, slots=True)
class ExecutionPlan:
    """Hold the planned execution of a run.

    Attributes:
        policy: Memory policy.
        tokens: Tokens of the largest micro-batch.
        micro_batches: Micro-batches of the mean step.
        costs: Bytes and seconds of one layer for the largest micro-batch.
        peak: Activations on the device at the peak.
        host_bytes: Bytes pinned in host memory.
        step_s: Predicted seconds of the mean step.
        step_tokens: Tokens of the mean step, of one GPU.
        kept: The peak with nothing recomputed, at the same micro-batch.
        recomputed: The peak with everything recomputed, at the same micro-batch.
        graph_bytes: Memory of CUDA graphs.
    """

    policy: MemoryPolicy
    tokens: int
    micro_batches: int
    costs: LayerCosts
    peak: PeakMemory
    host_bytes: int
    step_s: float
    step_tokens: float
    kept: PeakMemory
    recomputed: PeakMemory
    graph_bytes: int = 0

    @property
    def tokens_per_s(self) -> float:
        """Predicted speed of one GPU."""
        return self.step_tokens / self.step_s


def plan_execution(inputs: PlanInputs, execution: Execution | None = None) -> ExecutionPlan:
    """Return the execution plan of the settings' memory policy.

    On auto it is the fastest policy that fits, with memory free for the estimate's error if possible. When nothing
    fits, it is the smallest policy. Raises AdapterError for wrong targets.
    """
    policy = inputs.policy or _fitting(inputs, execution)
    batch = inputs.micro_batch(policy.micro_tokens or inputs.config.max_length)
    costs = _costs(inputs, batch, execution, policy)
    room = room_of(inputs, batch.tokens, execution, policy.dequantized_layers)
    records = _records(policy, inputs)
    beside_s = (GRAPH_STEP_S if records else STEP_S + optimizer_s(inputs)) if inputs.on_cuda else 0.0
    plan = _plan(policy, costs, room, batch, inputs, beside_s)
    return replace(plan, graph_bytes=graph_bytes(costs, policy, batch.tokens)) if records else plan


def uncertainty_of(inputs: PlanInputs) -> float:
    """Return the half-width of the memory estimate for this kind of model and device."""
    shape = inputs.shape
    measured = not shape.counted and shape.is_gated and inputs.on_cuda
    return UNCERTAINTY if measured else UNCERTAINTY_ELSEWHERE


def room_of(inputs: PlanInputs, tokens: int, execution: Execution | None = None, dequantized_layers: int = 0) -> Room:
    """Return the memory for activations beside static memory, on the device and on the host.

    Reading embeddings from host memory takes the time of micro-batches of `tokens`.
    """
    wide = execution is not None and execution.wide_stream
    stays = total_bytes(static_memory(inputs, wide=wide, dequantized_layers=dequantized_layers))
    rate = inputs.hardware.link_gbs * 1e9
    return Room(
        device_bytes=inputs.hardware.memory_bytes - stays,
        host_bytes=max(0, inputs.hardware.host_bytes - inputs.host_moment_bytes),
        link=Link(rate, rate) if inputs.on_cuda and rate and inputs.shards == 1 else None,
        embedding_bytes=movable_embedding_bytes(inputs),
        embedding_s=tokens * inputs.shape.hidden * inputs.width / rate if rate else 0.0,
        between_s=inputs.between_bytes / rate if rate else 0.0,
    )


def _costs(
    inputs: PlanInputs,
    batch: MicroBatchSize,
    execution: Execution | None,
    policy: MemoryPolicy = MemoryPolicy(),  # noqa: B008 (frozen)
) -> LayerCosts:
    execution = execution or execution_of(inputs)
    trained = Trained(
        targets=inputs.targets,
        mask_bytes=_mask_bytes(inputs),
        dora=inputs.is_dora,
        rows=bool(inputs.config.trainable_tokens) and not inputs.is_full,
        head_gradient_bytes=inputs.head_gradient_bytes,
    )
    count = partial(activations, inputs.shape, trained, batch, width=inputs.width)
    live = count(execution=execution)
    if inputs.shape.recurrences:
        eager = count(execution=replace(execution, fused=False))
        live = with_recurrent_layers(live, eager, inputs.shape, batch, inputs.width)
    return layer_costs(inputs, batch, live, execution, policy, graphs=_records(policy, inputs))


def _mask_bytes(inputs: PlanInputs) -> int:
    """Return the bytes of one entry of a dropout mask. CUDA keeps a boolean, a CPU the scaled noise."""
    if not inputs.config.dropout or inputs.is_full:
        return 0
    return 1 if inputs.on_cuda else inputs.width


def _fitting(inputs: PlanInputs, execution: Execution | None) -> MemoryPolicy:
    """Return the automatically chosen policy. It names its micro-batch unless that is `max_length`."""
    most = inputs.most_tokens
    batch = inputs.micro_batch(most)
    costs = _costs(inputs, batch, execution)
    room = room_of(inputs, batch.tokens, execution)
    policy = _fastest(costs, room, inputs, batch.tokens)
    if execution is None and policy.keeps_everything and policy.micro_tokens is None:
        policy = _fill_spare_memory(costs, room, inputs, batch)
    return policy.sized(most, inputs.config.max_length)


def _fill_spare_memory(costs: LayerCosts, room: Room, inputs: PlanInputs, batch: MicroBatchSize) -> MemoryPolicy:
    """Return the policy that keeps everything and fills spare memory.

    CUDA graphs come first, if micro-batches wait for the CPU. Dequantized weights fill the rest, as in the engine.
    """
    used = Split(costs, 0, 0).device_bytes(0) * (1 + FRAGMENTATION)
    spare = room.device_bytes - _margin_bytes(inputs, uncertainty_of(inputs)) - used
    policy = MemoryPolicy(cuda_graph_max_tokens=_graph_tokens(costs, inputs, batch))
    if (graphs := graph_bytes(costs, policy, batch.tokens)) > spare:
        policy, graphs = MemoryPolicy(), 0
    layer_bytes = dense_bytes(inputs, 1)
    layers = max(0, min(inputs.shape.layers, int((spare - graphs) // layer_bytes))) if layer_bytes else 0
    return replace(policy, dequantized_layers=layers)


def _margin_bytes(inputs: PlanInputs, margin: float) -> float:
    """Return the memory to leave free for an estimate that is wrong by `margin`."""
    return inputs.hardware.memory_bytes * (1 - 1 / (1 + margin))


def _graph_tokens(costs: LayerCosts, inputs: PlanInputs, batch: MicroBatchSize) -> int:
    """Return the most tokens of a micro-batch that runs as a CUDA graph."""
    every = MemoryPolicy(cuda_graph_max_tokens=batch.tokens)
    if not _records(every, inputs):
        return 0
    bare = _costs(inputs, batch, None, every)
    gpu_s = bare.forward_s + bare.backward_s
    return graph_tokens(batch.tokens, gpu_s, costs.launch_s, inputs.mean_step_tokens)


def _records(policy: MemoryPolicy, inputs: PlanInputs) -> bool:
    """Return True when `policy` has CUDA graphs and the layers can run them.

    They must be compiled, in 16 bits or fp8, and without capped scores. Graphs hold the gradients of adapters only.
    """
    compiled = execution_of(inputs).fused and inputs.on_cuda
    excluded = inputs.shape.capped_scores or inputs.shape.unpacked or inputs.is_full or inputs.base_shards > 1
    excluded = excluded or inputs.trains_outside_layers
    able = compiled and inputs.compute in ("bf16", "fp8") and not excluded
    return policy.cuda_graph_max_tokens > 0 and policy.takes_graphs and able


def graph_bytes(costs: LayerCosts, policy: MemoryPolicy, tokens: int) -> int:
    """Return the memory of the CUDA graphs of `policy`.

    It is that of a second micro-batch, because micro-batches without graphs need their own. `costs` are those of a
    micro-batch of `tokens`.
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
            device_bytes=int((room.device_bytes - _margin_bytes(inputs, margin)) / (1 + FRAGMENTATION)),
            embedding_bytes=embeddings,
            # host memory has no fragmentation, so the embeddings take their full size there
            host_bytes=room.host_bytes - (room.embedding_bytes - embeddings),
        )
        # each micro-batch of sharded weights gathers them anew: on two H200s four of them took 1.5 times one's seconds
        found = None if inputs.on_cuda and inputs.shards == 1 else solve(costs, usable)
        if found is None or (found.policy != MemoryPolicy() and inputs.shards == 1):
            # on a CPU only when nothing else fits: the model does not cover the cost of small micro-batches there
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
    policy: MemoryPolicy, costs: LayerCosts, room: Room, batch: MicroBatchSize, inputs: PlanInputs, beside_s: float
) -> ExecutionPlan:
    split = Split.of(policy, costs)
    offloaded = policy.offloaded_layers if room.link else 0  # a CPU has no other memory to offload to
    step_tokens = inputs.mean_step_tokens
    fits_one = inputs.largest_step_tokens <= batch.tokens
    computed = step_tokens * inputs.padding
    count = 1 if fits_one else math.ceil(computed / batch.tokens)
    if inputs.shape.alone:
        count = math.ceil(min(inputs.config.examples_per_step, max(inputs.stats.rows, 1)) / inputs.gpus)
    return ExecutionPlan(
        policy=policy,
        tokens=batch.tokens,
        micro_batches=count,
        costs=costs,
        peak=split.peak(offloaded),
        host_bytes=split.saved_by(offloaded) + (room.embedding_bytes if policy.host_embeddings else 0),
        step_s=beside_s
        + (count - 1) * room.between_s
        + count * _micro_batch_s(policy, costs, room, computed / count / batch.tokens),
        step_tokens=step_tokens,
        kept=Split(costs, 0, 0).peak(0),
        recomputed=Split(costs, costs.layers, costs.layers).peak(0),
    )


def _micro_batch_s(policy: MemoryPolicy, largest: LayerCosts, room: Room, share: float) -> float:
    """Return the seconds of a micro-batch with a share of the largest one's tokens.

    `largest` and `room` are those of the largest micro-batch.
    """
    costs = largest.scaled(share)
    if policy.offloaded_layers and room.link:
        seconds = timeline_s(costs, policy, room.link, room.device_bytes)
    else:
        seconds = Split.of(policy, costs).work_s
    return seconds + (room.embedding_s * share if policy.host_embeddings else 0.0)


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Hold the estimated peak memory.

    Attributes:
        components: Parts of the peak.
        kept_bytes: The peak with every activation kept, at the same micro-batch.
        recomputed_bytes: The peak with every layer recomputed, at the same micro-batch.
        uncertainty: Relative error: the true peak lies within ± `uncertainty` of the estimate.
        host_bytes: Bytes pinned in host memory.
    """

    components: tuple[Component, ...]
    kept_bytes: int
    recomputed_bytes: int
    uncertainty: float
    host_bytes: int = 0

    @property
    def peak_bytes(self) -> int:
        """Peak memory: the sum of the components."""
        return total_bytes(self.components)

    @property
    def needed_bytes(self) -> int:
        """Peak memory without the parts that only fill spare memory."""
        return total_bytes(part for part in self.components if not part.spare)

    def fits(self, hardware: Hardware) -> bool:
        """Return True when the expected peak is within the device's memory or its budget."""
        return self.peak_bytes <= hardware.memory_bytes

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready mapping."""
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

    The memory policy is that of the settings, or on auto the plan's. `execution` replaces lorafit's own execution of
    the layers. Raises AdapterError for wrong targets.
    """
    return memory_of(plan_execution(inputs, execution), inputs, execution)


def memory_of(plan: ExecutionPlan, inputs: PlanInputs, execution: Execution | None = None) -> MemoryEstimate:
    """Return the peak memory of a run with this execution plan."""
    wide = execution is not None and execution.wide_stream
    policy = plan.policy
    stays = static_memory(
        inputs, wide=wide, host_embeddings=policy.host_embeddings, dequantized_layers=policy.dequantized_layers
    )
    default_bytes = total_bytes(static_memory(inputs, wide=wide))
    waiting = inputs.between_bytes // 2 if plan.micro_batches > 1 else 0  # gradients, for the step's last micro-batch
    return MemoryEstimate(
        components=(*stays, *_transient(plan.peak, policy, plan.tokens, inputs.shape.layers), *_of_graphs(plan)),
        kept_bytes=default_bytes + _transient_bytes(plan.kept),
        recomputed_bytes=default_bytes + _transient_bytes(plan.recomputed),
        uncertainty=uncertainty_of(inputs),
        host_bytes=plan.host_bytes + inputs.host_moment_bytes + waiting,
    )


def _transient(peak: PeakMemory, policy: MemoryPolicy, tokens: int, layers: int) -> list[Component]:
    size = peak.stays_bytes + peak.in_flight_bytes + peak.working_bytes
    parts = [
        Component(
            "activations", peak.stays_bytes, f"one micro-batch of {tokens:,} tokens: {kept_in_words(policy, layers)}"
        ),
        Component(
            "activations in flight",
            peak.in_flight_bytes,
            "two layers being copied to or from the host; more if memory allows",
        ),
        Component("loss or one layer's backward", peak.working_bytes, "the larger of the two, at the peak"),
        Component("fragmentation", round(FRAGMENTATION * size), f"{FRAGMENTATION:.0%} of temporary memory"),
    ]
    return [part for part in parts if part.size_bytes or part.name != "activations in flight"]


def _of_graphs(plan: ExecutionPlan) -> list[Component]:
    if not plan.graph_bytes:
        return []
    why = "activations of micro-batches in CUDA graphs, beside those of other micro-batches"
    return [Component("CUDA graphs", plan.graph_bytes, why, spare=True)]


def _transient_bytes(peak: PeakMemory) -> int:
    return total_bytes(_transient(peak, MemoryPolicy(), 0, 0))


def kept_in_words(policy: MemoryPolicy, layers: int) -> str:
    """Return in words the activations that each layer keeps on the device."""
    if policy.offloaded_layers:
        return f"activations of {layers - policy.offloaded_layers} of {layers} layers, kept until their backward pass"
    if policy.recompute_layers == layers:
        return "each layer's input; the rest is recomputed"
    parts = [
        f"the input of {policy.recompute_layers} layers" if policy.recompute_layers else "",
        f"all but the feed-forward of {policy.recompute_mlp_layers}" if policy.recompute_mlp_layers else "",
    ]
    kept = ", ".join(part for part in parts if part)
    return f"{kept}, everything of the rest" if kept else "everything the backward pass needs"
