"""Speed: seconds of one layer and of the loss, from a GPU's data sheet.

The shares reproduce ten training runs of one H200 (2026-11-22, 8B, NF4, r = 16 on q and v, compiled layers; the table
is in tests/memory/test_measured_speed.py). Other GPUs are extrapolated. A run measures its own layers and solves again.
"""

from __future__ import annotations

from dataclasses import dataclass

from lorafit.config.memory_policy import MemoryPolicy
from lorafit.hardware import Hardware
from lorafit.hardware.device import CORE_GFLOPS
from lorafit.memory.footprint import NF4_BYTES, Activations, Execution
from lorafit.memory.inputs import MicroBatch, PlanInputs
from lorafit.memory.layer_costs import LayerCosts
from lorafit.shapes import ModelShape, Projection

MATMUL_SHARE, ATTENTION_SHARE, BANDWIDTH_SHARE = 0.71, 0.63, 0.70
"""Of the GPU's 16-bit peak that matmuls and attention reach, and of its memory's bandwidth."""
TAIL_S = 1.5e-9
"""What a matmul loses at its end, where part of the GPU has no tile left to work on, for each value of the dimension
that it sums over: with unpacking, the 14 ms that a second micro-batch cost on an H200. ASSUMED alike on others."""
ATTENTION_TRAFFIC = 2.2
"""Bytes that attention moves forward for each byte of its queries, keys, values and output: most of what short rows
take. Fitted to 0.48 ms a layer for 32 × 256 tokens and 1.15 ms for 4 × 2,048, forward and backward, on an H200."""
ATTENTION_BACKWARD = 2.5
"""Attention's backward against its forward."""
FP8_SPEEDUP = 1.55
"""Frozen matmuls in fp8 against 16 bits, quantising their operands included."""
FP32_SLOWDOWN = 8.0
FUSED_TRAFFIC, EAGER_TRAFFIC = (1.0, 1.8), (5.0, 8.0)
"""Bytes moved beside the matmuls, forward and backward, for each byte that a layer keeps."""
ADAPTER_TRAFFIC = (2.0, 3.0)
"""Bytes moved, forward and backward, for each byte that goes into or comes out of an adapted linear."""
INTO = ("gate", "up", "gate_up")
"""Projections into a feed-forward's inner values."""
RECOMPUTE = 1.1
"""A layer's recomputation against its first forward pass."""
FUSED_LAUNCH_S, EAGER_LAUNCH_S = 2.0e-3, 2.5e-3
"""Least time of a layer's pass in one direction: the processor's, starting its kernels. Compiled: what 2,048 tokens of
8B took on an H200's host (144 ms a step, of which the GPU computed for 110); eager: ASSUMED. Other hosts differ."""
DENSE_LAUNCH_S = 1.4e-3
"""The same where the weights lie unpacked, or are in 16 bits anyway: at 1.7 ms a pass the GPU, and no longer the
processor, sets the pace (2,048 tokens of 8B on such a host); a profile of the processor, which slows it, had 1.4."""
GRAPH_LAUNCH_S = 1.0e-4
"""The same within a CUDA graph: some 30 kernels a pass, each of at least 3 µs (arithmetic)."""
EMULATED = 0.25
"""A CPU in a 16-bit precision that it does not have, against fp32."""


def layer_costs(
    inputs: PlanInputs,
    batch: MicroBatch,
    live: Activations,
    execution: Execution,
    policy: MemoryPolicy,
    *,
    graphs: bool = False,
) -> LayerCosts:
    """Return the bytes and seconds of one layer for a micro-batch.

    The mean layer saves its share of what the dequantized layers of `policy` save. With `graphs` a single call starts
    all kernels.
    """
    dequantized = policy.dequantized_layers / inputs.shape.layers
    matmuls = _matmuls(inputs, batch.tokens)
    attention = _attention_s(inputs, batch.tokens)
    out, home = _traffic_s(inputs, batch.tokens, live, execution)
    fixed = matmuls.tail_s + _unpack_s(inputs) * (1 - dequantized)
    unpacked = not inputs.in_4_bits or dequantized == 1
    launch = GRAPH_LAUNCH_S if graphs else _launch_s(inputs, execution, unpacked=unpacked)
    forward_s = max(launch, matmuls.forward_s + attention + out + fixed)
    return LayerCosts(
        layers=inputs.shape.layers,
        kept_bytes=live.layer_bytes,
        feed_forward_bytes=live.feed_forward_bytes,
        whole_bytes=min(live.input_bytes, live.feed_forward_bytes),
        forward_s=forward_s,
        backward_s=max(launch, matmuls.backward_s + ATTENTION_BACKWARD * attention + home + fixed),
        recompute_feed_forward_s=max(launch, matmuls.forward_s + fixed) * matmuls.feed_forward,
        recompute_layer_s=RECOMPUTE * forward_s,
        kept_working_bytes=live.backward_bytes,
        feed_forward_working_bytes=live.backward_bytes + live.layer_bytes - live.feed_forward_bytes,
        whole_working_bytes=live.backward_bytes + live.layer_bytes,
        fixed_working_bytes=live.weight_bytes,
        fixed_s=fixed,
        launch_s=launch,
        loss_bytes=live.loss_bytes,
        fixed_loss_bytes=live.chunk_bytes,
        loss_s=4 * batch.supervised * inputs.shape.vocab * inputs.shape.hidden / flops_per_s(inputs),
    )


def flops_per_s(inputs: PlanInputs) -> float:
    """Return the FLOP/s of 16-bit (or, as set, 32-bit) matmuls."""
    wide, hardware = inputs.width == 4, inputs.hardware
    if not inputs.on_cuda:
        return hardware.cores * CORE_GFLOPS * 1e9 * (1.0 if wide or hardware.bf16 else EMULATED)
    return hardware.tflops_bf16 * 1e12 * MATMUL_SHARE / (FP32_SLOWDOWN if wide else 1.0)


@dataclass(frozen=True, slots=True)
class _Matmuls:
    """Hold the seconds of one layer's matmuls in each direction.

    Attributes:
        forward_s: Seconds of the forward pass, without `tail_s`.
        backward_s: Seconds of the backward pass, without `tail_s`.
        tail_s: Seconds of either direction that do not depend on the tokens.
        feed_forward: Share of the work that goes into the MLP's inner values.
    """

    forward_s: float
    backward_s: float
    tail_s: float
    feed_forward: float


def _matmuls(inputs: PlanInputs, tokens: int) -> _Matmuls:
    shape, rate = inputs.shape, flops_per_s(inputs)
    faster = FP8_SPEEDUP if inputs.compute == "fp8" else 1.0
    weights = sum(part.parameters * part.active for part in shape.projections) / shape.layers
    inner = sum(part.parameters * part.active for part in shape.projections if part.role in INTO) / shape.layers
    # forward sums over a projection's inputs, backward over its outputs: the mean of both stands for either
    depth = sum((part.inputs + part.outputs) / 2 * _calls(part, shape) for part in shape.projections) / shape.layers
    adapters = inputs.adapter_parameters / shape.layers
    frozen = 2 * tokens * weights / (rate * faster)
    return _Matmuls(
        forward_s=frozen + 2 * tokens * adapters / rate,
        backward_s=frozen + 4 * tokens * adapters / rate,
        tail_s=TAIL_S * depth / faster if inputs.on_cuda else 0.0,
        feed_forward=inner / weights,
    )


def _calls(part: Projection, shape: ModelShape) -> float:
    """Return the matmuls of one forward pass through the model; the experts of a layer are one, grouped."""
    return part.count * part.active / max(shape.experts_per_token, 1) if part.stacked else part.count


def _attention_s(inputs: PlanInputs, tokens: int) -> float:
    """Return the seconds of scores and their product with the values, each token looking at half a row."""
    shape, hardware = inputs.shape, inputs.hardware
    flops = 2 * tokens * inputs.stats.mean_tokens * shape.heads * shape.head_dim
    if not inputs.on_cuda:
        return flops / (hardware.cores * CORE_GFLOPS * 1e9)
    values = 2 * (shape.heads + shape.kv_heads) * shape.head_dim * inputs.width
    moved = ATTENTION_TRAFFIC * tokens * values
    return flops / (hardware.tflops_bf16 * 1e12 * ATTENTION_SHARE) + _moving_s(moved, hardware)


def _moving_s(size_bytes: float, hardware: Hardware) -> float:
    """Return the seconds of moving so many bytes in the device's own memory; 0 where its bandwidth is not known."""
    return size_bytes / (hardware.bandwidth_gbs * 1e9 * BANDWIDTH_SHARE) if hardware.bandwidth_gbs else 0.0


def _traffic_s(inputs: PlanInputs, tokens: int, live: Activations, execution: Execution) -> tuple[float, float]:
    """Return the seconds, forward and backward, of norms, activations, residuals and the adapters' sums."""
    parts = inputs.shape.named(inputs.targets)
    adapted = sum((part.inputs + part.outputs) * part.count for part in parts) / inputs.shape.layers
    moved = FUSED_TRAFFIC if execution.fused else EAGER_TRAFFIC
    forward, backward = (
        _moving_s(layer * live.layer_bytes + adapter * adapted * tokens * inputs.width, inputs.hardware)
        for layer, adapter in zip(moved, ADAPTER_TRAFFIC, strict=True)
    )
    return forward, backward


def _unpack_s(inputs: PlanInputs) -> float:
    """Return the seconds of dequantising one layer's weights once: 4 bits read, the matmul's operand written."""
    if not inputs.in_4_bits:
        return 0.0
    written = 1 if inputs.compute == "fp8" else inputs.width
    return _moving_s(inputs.shape.linear_parameters / inputs.shape.layers * (NF4_BYTES + written), inputs.hardware)


def _launch_s(inputs: PlanInputs, execution: Execution, *, unpacked: bool) -> float:
    """Return the least seconds of a layer's pass in one direction; `unpacked` weights need no dequantising kernels."""
    if not inputs.on_cuda:
        return 0.0
    if not execution.fused:
        return EAGER_LAUNCH_S
    return DENSE_LAUNCH_S if unpacked and inputs.compute != "fp8" else FUSED_LAUNCH_S
