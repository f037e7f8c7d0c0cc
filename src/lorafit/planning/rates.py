"""Seconds of one layer and of the loss, from a card's data sheet: what the dial is solved with before anything ran.

The shares make ten training runs of one H200 come out (2026-11-22, 8B, NF4, r = 16 on q and v, compiled layers; the
table is in tests/planning/test_measured_speed.py). Other cards are extrapolated; a run measures its own layers before
it solves again.
"""

from __future__ import annotations

from dataclasses import dataclass

from lorafit.config import RunConfig
from lorafit.planning.activations import Activations, Execution
from lorafit.planning.hardware import CORE_GFLOPS, Hardware
from lorafit.planning.layer_costs import LayerCosts
from lorafit.planning.micro_batch import MicroBatch
from lorafit.planning.shape import ModelShape, Projection
from lorafit.planning.standing import NF4_BYTES, WIDTH, adapter_parameters, compute_of

MATMUL_SHARE, ATTENTION_SHARE, BANDWIDTH_SHARE = 0.71, 0.63, 0.70
"""Of the card's 16-bit peak that matmuls and attention reach, and of its memory's bandwidth."""
TAIL_S = 1.5e-9
"""What a matmul loses at its end, where part of the card has no tile left to work on, for each value of the dimension
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
8B took on an H200's host (144 ms a step, of which the card computed for 110); eager: ASSUMED. Other hosts differ."""
DENSE_LAUNCH_S = 1.4e-3
"""The same where the weights lie unpacked, or are in 16 bits anyway: at 1.7 ms a pass the card, and no longer the
processor, sets the pace (2,048 tokens of 8B on such a host); a profile of the processor, which slows it, had 1.4."""
GRAPH_LAUNCH_S = 1.0e-4
"""The same within a CUDA graph: some 30 kernels a pass, each of at least 3 µs (arithmetic)."""
EMULATED = 0.25
"""A CPU in a 16-bit precision that it does not have, against fp32."""


def layer_costs(
    shape: ModelShape,
    targets: tuple[str, ...],
    config: RunConfig,
    hardware: Hardware,
    batch: MicroBatch,
    row_tokens: float,
    live: Activations,
    execution: Execution,
    dense: int = 0,
    graphs: bool = False,
) -> LayerCosts:
    """Bytes and seconds of one layer for a micro-batch whose rows have `row_tokens` tokens on average; `dense`: so many
    layers' weights lie unpacked, and what the mean layer saves by that is counted; `graphs`: a single call starts all
    kernels."""
    matmuls = _matmuls(shape, targets, config, hardware, batch.tokens)
    attention = _attention_s(shape, config, hardware, batch.tokens, row_tokens)
    out, home = _traffic_s(shape, targets, config, hardware, batch.tokens, live, execution)
    fixed = matmuls.tail_s + _unpack_s(shape, config, hardware) * (1 - dense / shape.layers)
    unpacked = config.quantization != "nf4" or dense == shape.layers
    launch = GRAPH_LAUNCH_S if graphs else _launch_s(config, hardware, execution, unpacked=unpacked)
    forward_s = max(launch, matmuls.forward_s + attention + out + fixed)
    return LayerCosts(
        layers=shape.layers,
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
        loss_s=_loss_s(shape, config, hardware, batch),
    )


def flops_per_s(config: RunConfig, hardware: Hardware) -> float:
    """FLOP/s of 16-bit (or, as set, 32-bit) matmuls."""
    wide = WIDTH[compute_of(config, hardware)] == 4
    if hardware.kind == "cpu":
        return hardware.cores * CORE_GFLOPS * 1e9 * (1.0 if wide or hardware.bf16 else EMULATED)
    return hardware.tflops_bf16 * 1e12 * MATMUL_SHARE / (FP32_SLOWDOWN if wide else 1.0)


@dataclass(frozen=True, slots=True)
class _Matmuls:
    """Seconds of one layer's matmuls in each direction, `tail_s` of each whatever the tokens left out; and the share
    that goes into the feed-forward's inner values."""

    forward_s: float
    backward_s: float
    tail_s: float
    feed_forward: float


def _matmuls(
    shape: ModelShape, targets: tuple[str, ...], config: RunConfig, hardware: Hardware, tokens: int
) -> _Matmuls:
    rate = flops_per_s(config, hardware)
    faster = FP8_SPEEDUP if compute_of(config, hardware) == "fp8" else 1.0
    weights = sum(part.parameters * part.active for part in shape.projections) / shape.layers
    inner = sum(part.parameters * part.active for part in shape.projections if part.role in INTO) / shape.layers
    # forward sums over a projection's inputs, backward over its outputs: the mean of both stands for either
    depth = sum((part.inputs + part.outputs) / 2 * _calls(part, shape) for part in shape.projections) / shape.layers
    adapters = adapter_parameters(shape, targets, config.rank) / shape.layers
    frozen = 2 * tokens * weights / (rate * faster)
    return _Matmuls(
        forward_s=frozen + 2 * tokens * adapters / rate,
        backward_s=frozen + 4 * tokens * adapters / rate,
        tail_s=TAIL_S * depth / faster if hardware.kind == "cuda" else 0.0,
        feed_forward=inner / weights,
    )


def _calls(part: Projection, shape: ModelShape) -> float:
    """Matmuls of one forward pass through the model: experts of a layer are one, grouped."""
    return part.count * part.active / max(shape.experts_per_token, 1) if part.stacked else part.count


def _attention_s(shape: ModelShape, config: RunConfig, hardware: Hardware, tokens: int, row_tokens: float) -> float:
    """Scores and their product with the values, each token looking at half a row; and reading and writing them."""
    flops = 2 * tokens * row_tokens * shape.heads * shape.head_dim
    if hardware.kind == "cpu":
        return flops / (hardware.cores * CORE_GFLOPS * 1e9)
    values = 2 * (shape.heads + shape.kv_heads) * shape.head_dim * WIDTH[compute_of(config, hardware)]
    moved = ATTENTION_TRAFFIC * tokens * values
    return flops / (hardware.tflops_bf16 * 1e12 * ATTENTION_SHARE) + _moving_s(moved, hardware)


def _moving_s(size_bytes: float, hardware: Hardware) -> float:
    """Seconds of reading or writing so much of the device's own memory; 0 where its bandwidth is not known."""
    return size_bytes / (hardware.bandwidth_gbs * 1e9 * BANDWIDTH_SHARE) if hardware.bandwidth_gbs else 0.0


def _traffic_s(
    shape: ModelShape,
    targets: tuple[str, ...],
    config: RunConfig,
    hardware: Hardware,
    tokens: int,
    live: Activations,
    execution: Execution,
) -> tuple[float, float]:
    """Norms, activations, residuals and the adapters' sums, forward and backward: bound by the memory."""
    width = WIDTH[compute_of(config, hardware)]
    adapted = sum((part.inputs + part.outputs) * part.count for part in shape.named(targets)) / shape.layers
    moved = FUSED_TRAFFIC if execution.fused else EAGER_TRAFFIC
    forward, backward = (
        _moving_s(layer * live.layer_bytes + adapter * adapted * tokens * width, hardware)
        for layer, adapter in zip(moved, ADAPTER_TRAFFIC, strict=True)
    )
    return forward, backward


def _unpack_s(shape: ModelShape, config: RunConfig, hardware: Hardware) -> float:
    """Dequantising one layer's weights once: reading 4 bits and writing what the matmul takes."""
    if config.quantization != "nf4":
        return 0.0
    compute = compute_of(config, hardware)
    written = 1 if compute == "fp8" else WIDTH[compute]
    return _moving_s(shape.linear_parameters / shape.layers * (NF4_BYTES + written), hardware)


def _launch_s(config: RunConfig, hardware: Hardware, execution: Execution, *, unpacked: bool) -> float:
    """The least that a layer's pass in one direction takes; `unpacked`: no kernels unpack its weights."""
    if hardware.kind != "cuda":
        return 0.0
    if not execution.fused:
        return EAGER_LAUNCH_S
    return DENSE_LAUNCH_S if unpacked and compute_of(config, hardware) != "fp8" else FUSED_LAUNCH_S


def _loss_s(shape: ModelShape, config: RunConfig, hardware: Hardware, batch: MicroBatch) -> float:
    """The head's matmul and the one back through it."""
    return 4 * batch.supervised * shape.vocab * shape.hidden / flops_per_s(config, hardware)
