"""Speed: seconds of one layer and of the loss, from a GPU's data sheet.

The constants reproduce ten training runs of one H200 (2026-11-22, 8B, NF4, r = 16 on q and v, compiled layers; the
table is in tests/memory/test_measured_speed.py). Other GPUs are extrapolated. A run measures its own layers and solves
again.
"""

from __future__ import annotations

from dataclasses import dataclass

from lorafit.config.memory_policy import MemoryPolicy
from lorafit.hardware import Hardware
from lorafit.hardware.device import CORE_GFLOPS
from lorafit.memory.footprint import NF4_BYTES, Activations, Execution
from lorafit.memory.inputs import MASTER_BYTES, MicroBatchSize, PlanInputs, moment_bytes
from lorafit.memory.layer_costs import LayerCosts
from lorafit.shapes import ModelShape, Projection

MATMUL_SHARE, ATTENTION_SHARE, BANDWIDTH_SHARE = 0.71, 0.63, 0.70
"""Shares of the 16-bit peak that matmuls and attention reach, and of the memory bandwidth."""
TAIL_S = 1.5e-9
"""Seconds that a matmul loses at its end for each value of the summed dimension. Part of the GPU has no tile left then.
With dequantizing it makes the 14 ms that a second micro-batch cost on an H200. ASSUMED for other GPUs."""
ATTENTION_TRAFFIC = 2.2
"""Bytes that attention's forward moves for each byte of its queries, keys, values and output. They take most of the
time of short rows. Fitted to 0.48 ms a layer for 32 × 256 tokens and 1.15 ms for 4 × 2,048, forward and backward, on an
H200."""
ATTENTION_BACKWARD = 2.5
"""Time of attention's backward relative to its forward."""
FP8_SPEEDUP = 1.55
"""Speed of frozen matmuls in fp8 relative to 16 bits, including quantization of their operands."""
FULL_FP8_SPEEDUP = 1.45
"""The same where weights train, in all three products of a linear. ASSUMED: arithmetic of FP8 products at 1.9 times the
16-bit rate, whose operands are read and written in 8 bits in both directions."""
FP32_SLOWDOWN = 8.0
FUSED_TRAFFIC, EAGER_TRAFFIC = (1.0, 1.8), (5.0, 8.0)
"""Bytes moved beside the matmuls, forward and backward, for each byte that a layer keeps."""
ADAPTER_TRAFFIC = (2.0, 3.0)
"""Bytes moved, forward and backward, for each byte of an adapted linear's input and output."""
INTO = ("gate", "up", "gate_up")
"""Roles of the projections into a feed-forward's inner values."""
RECOMPUTE = 1.1
"""Time of a layer's recompute relative to its first forward pass."""
FUSED_LAUNCH_S, EAGER_LAUNCH_S = 2.0e-3, 2.5e-3
"""Least seconds of a layer's pass in one direction. The CPU launches its kernels in them. Compiled: 2,048 tokens of 8B
on an H200's host took 144 ms a step, of which the GPU computed for 110. Eager: ASSUMED. Other hosts differ."""
DENSE_LAUNCH_S = 1.4e-3
"""The same for dequantized or 16-bit weights. At 1.7 ms a pass the GPU and no longer the CPU is the limit (2,048 tokens
of 8B on such a host). A profile of the CPU, which slows it down, had 1.4 ms."""
GRAPH_LAUNCH_S = 1.0e-4
"""The same within a CUDA graph. A pass has about 30 kernels, each of at least 3 µs (arithmetic)."""
IN_BACKWARD = 1.05
"""Seconds of updates within the backward pass for each second of copying their moments over the link. 8B on an H200
took 1.375 s a step (2026-12-01), of which layers and loss were predicted to take 0.75. ASSUMED for other GPUs."""
EMULATED = 0.25
"""Speed of a CPU in a 16-bit precision that it lacks, relative to fp32."""


def layer_costs(
    inputs: PlanInputs,
    batch: MicroBatchSize,
    live: Activations,
    execution: Execution,
    policy: MemoryPolicy,
    *,
    graphs: bool,
) -> LayerCosts:
    """Return the bytes and seconds of one layer for a micro-batch.

    The dequantized layers of `policy` save time, which is spread over all layers. With `graphs` a single call launches
    all kernels.
    """
    dequantized = policy.dequantized_layers / inputs.shape.layers
    matmuls = _matmuls(inputs, batch.tokens)
    attention = _attention_s(inputs, batch.tokens)
    traffic_forward, traffic_backward = _traffic_s(inputs, batch.tokens, live, execution)
    fixed = matmuls.tail_s + _dequantize_s(inputs) * (1 - dequantized)
    is_dense = not inputs.in_4_bits or dequantized == 1
    head_flops = (6 if inputs.head_gradient_bytes else 4) * inputs.shape.vocab * inputs.shape.hidden
    launch = GRAPH_LAUNCH_S if graphs else _launch_s(inputs, execution, is_dense=is_dense)
    forward_s = max(launch, matmuls.forward_s + attention + traffic_forward + fixed)
    return LayerCosts(
        layers=inputs.shape.layers,
        kept_bytes=live.layer_bytes,
        feed_forward_bytes=live.feed_forward_bytes,
        whole_bytes=min(live.input_bytes, live.feed_forward_bytes),
        forward_s=forward_s,
        backward_s=max(launch, matmuls.backward_s + ATTENTION_BACKWARD * attention + traffic_backward + fixed),
        recompute_feed_forward_s=max(launch, matmuls.forward_s + fixed) * matmuls.feed_forward,
        recompute_layer_s=RECOMPUTE * forward_s,
        kept_working_bytes=live.backward_bytes,
        feed_forward_working_bytes=live.backward_bytes
        + (live.heaviest_bytes or live.layer_bytes - live.feed_forward_bytes),
        whole_working_bytes=live.backward_bytes + max(live.layer_bytes, live.heaviest_bytes),
        fixed_working_bytes=live.weight_bytes,
        fixed_s=fixed,
        launch_s=launch,
        loss_bytes=live.loss_bytes,
        fixed_loss_bytes=live.chunk_bytes,
        loss_s=head_flops * batch.supervised / flops_per_s(inputs),
    )


def optimizer_s(inputs: PlanInputs) -> float:
    """Return the seconds in which the optimizer reads and writes every trained weight; 0 for adapters.

    Clipping reads the gradients; the update reads gradients, and reads and writes weights, master copies and moments.
    Moments in host memory go over the link to it, both ways.
    """
    if not inputs.is_full:
        return 0.0
    if inputs.updates_in_backward:
        moved = 2 * inputs.trained_parameters * moment_bytes(inputs.optimizer)
        return IN_BACKWARD * moved / (inputs.hardware.link_gbs * 1e9) if inputs.hardware.link_gbs else 0.0
    held = inputs.width + moment_bytes(inputs.optimizer) + (MASTER_BYTES if inputs.has_master_weights else 0)
    return _moving_s(inputs.trained_parameters * (2 * inputs.width + 2 * held) / inputs.shards, inputs.hardware)


def flops_per_s(inputs: PlanInputs) -> float:
    """Return the FLOP/s of matmuls in 16 bits, or in 32 bits under fp32."""
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
        feed_forward: Share of the work in projections into the MLP's inner values.
    """

    forward_s: float
    backward_s: float
    tail_s: float
    feed_forward: float


def _matmuls(inputs: PlanInputs, tokens: int) -> _Matmuls:
    shape, rate = inputs.shape, flops_per_s(inputs)
    in_fp8 = FULL_FP8_SPEEDUP if inputs.is_full else FP8_SPEEDUP
    faster = in_fp8 if inputs.compute == "fp8" else 1.0
    weights = sum(part.parameters * part.active for part in shape.projections) / shape.layers
    inner = sum(part.parameters * part.active for part in shape.projections if part.role in INTO) / shape.layers
    # forward sums over a projection's inputs and backward over its outputs, so the mean is used for both
    depth = sum((part.inputs + part.outputs) / 2 * _calls(part, shape) for part in shape.projections) / shape.layers
    adapters = 0.0 if inputs.is_full else inputs.active_adapter_parameters / shape.layers
    # the dropped-out input of a DoRA target goes through its frozen weight once more
    twice = inputs.shape.named(inputs.targets) if inputs.is_dora and inputs.config.dropout else ()
    again = 2 * tokens * sum(part.parameters for part in twice) / shape.layers / (rate * faster)
    frozen = 2 * tokens * weights / (rate * faster) + again
    return _Matmuls(
        forward_s=frozen + 2 * tokens * adapters / rate,
        backward_s=frozen * (2 if inputs.is_full else 1) + 4 * tokens * adapters / rate,
        tail_s=TAIL_S * depth / faster if inputs.on_cuda else 0.0,
        feed_forward=inner / weights,
    )


def _calls(part: Projection, shape: ModelShape) -> float:
    """Return the matmuls of one forward pass through the model.

    The experts of a layer are one grouped matmul.
    """
    return part.count * part.active / max(shape.experts_per_token, 1) if part.stacked else part.count


def _attention_s(inputs: PlanInputs, tokens: int) -> float:
    """Return the seconds of scores and their product with the values.

    The mean token attends to half a row.
    """
    shape, hardware = inputs.shape, inputs.hardware
    flops = 2 * tokens * inputs.stats.mean_tokens * shape.heads * shape.head_dim
    if not inputs.on_cuda:
        return flops / (hardware.cores * CORE_GFLOPS * 1e9)
    values = 2 * (shape.heads + shape.kv_heads) * shape.head_dim * inputs.width
    moved = ATTENTION_TRAFFIC * tokens * values
    return flops / (hardware.tflops_bf16 * 1e12 * ATTENTION_SHARE) + _moving_s(moved, hardware)


def _moving_s(size_bytes: float, hardware: Hardware) -> float:
    """Return the seconds of moving `size_bytes` in the device's own memory; 0 for unknown bandwidth."""
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


def _dequantize_s(inputs: PlanInputs) -> float:
    """Return the seconds of dequantizing one layer's weights once.

    It reads 4 bits a weight and writes the matmul's operand.
    """
    if not inputs.in_4_bits:
        return 0.0
    written = 1 if inputs.compute == "fp8" else inputs.width
    return _moving_s(inputs.shape.packed_parameters / inputs.shape.layers * (NF4_BYTES + written), inputs.hardware)


def _launch_s(inputs: PlanInputs, execution: Execution, *, is_dense: bool) -> float:
    """Return the least seconds of a layer's pass in one direction.

    Dense weights need no dequantize kernels.
    """
    if not inputs.on_cuda:
        return 0.0
    if not execution.fused:
        return EAGER_LAUNCH_S
    return DENSE_LAUNCH_S if is_dense and inputs.compute != "fp8" else FUSED_LAUNCH_S
