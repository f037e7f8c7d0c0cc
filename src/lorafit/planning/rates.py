"""Seconds of one layer and of the loss, from a card's data sheet: what the dial is solved with before anything ran.

The shares make the probe of 2026-11 on one H200 come out (8B, NF4, r = 16 on q and v, 4 × 2,048 tokens, compiled
layers: 17,375 tokens/s with everything kept, 11,798 with everything recomputed). Other cards are extrapolated; a run
measures its own layers before it solves again.
"""

from __future__ import annotations

from lorafit.config import RunConfig
from lorafit.planning.activations import Activations, Execution
from lorafit.planning.hardware import Hardware
from lorafit.planning.layer_costs import LayerCosts
from lorafit.planning.micro_batch import MicroBatch
from lorafit.planning.shape import ModelShape
from lorafit.planning.standing import NF4_BYTES, WIDTH, adapter_parameters, compute_of

MATMUL_SHARE, ATTENTION_SHARE, BANDWIDTH_SHARE = 0.70, 0.40, 0.70
"""Of the card's 16-bit peak that matmuls and attention reach, and of its memory's bandwidth."""
FP8_SPEEDUP = 1.8
"""Frozen matmuls in fp8 against 16 bits, quantising their operands included."""
FP32_SLOWDOWN = 8.0
FUSED_TRAFFIC, EAGER_TRAFFIC = (2.0, 3.5), (5.0, 8.0)
"""Bytes moved beside the matmuls, forward and backward, for each byte that a layer keeps."""
ADAPTER_TRAFFIC = (2.0, 3.0)
"""Bytes moved, forward and backward, for each byte that goes into or comes out of an adapted linear."""
RECOMPUTE = 1.1
"""A layer's recomputation against its first forward pass."""
FUSED_LAUNCH_S, EAGER_LAUNCH_S = 1e-3, 2.5e-3
"""ASSUMED least time of a layer's pass in one direction: starting its kernels."""
CORE_GFLOPS = 40.0
"""fp32 GFLOP/s of one processor core in training."""
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
) -> LayerCosts:
    """Bytes and seconds of one layer for a micro-batch whose rows have `row_tokens` tokens on average."""
    forward, feed_forward, back = _matmul_s(shape, targets, config, hardware, batch.tokens)
    attention = _attention_s(shape, hardware, batch.tokens, row_tokens)
    out, home = _traffic_s(shape, targets, config, hardware, batch.tokens, live, execution)
    unpack = _unpack_s(shape, config, hardware)
    launch = (FUSED_LAUNCH_S if execution.fused else EAGER_LAUNCH_S) if hardware.kind == "cuda" else 0.0
    forward_s = max(launch, forward + attention + out + unpack)
    return LayerCosts(
        layers=shape.layers,
        kept_bytes=live.layer_bytes,
        feed_forward_bytes=live.feed_forward_bytes,
        whole_bytes=min(live.input_bytes, live.feed_forward_bytes),
        forward_s=forward_s,
        backward_s=max(launch, back + 2.5 * attention + home + unpack),
        recompute_feed_forward_s=(forward_s - attention) * feed_forward / forward,
        recompute_layer_s=RECOMPUTE * forward_s,
        kept_working_bytes=live.backward_bytes,
        feed_forward_working_bytes=live.backward_bytes + live.layer_bytes - live.feed_forward_bytes,
        whole_working_bytes=live.backward_bytes + live.layer_bytes,
        fixed_working_bytes=live.weight_bytes,
        fixed_s=unpack,
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


def _matmul_s(
    shape: ModelShape, targets: tuple[str, ...], config: RunConfig, hardware: Hardware, tokens: int
) -> tuple[float, float, float]:
    """Forward, the part of it into the feed-forward's inner values, and backward of one layer."""
    rate = flops_per_s(config, hardware)
    frozen = rate * (FP8_SPEEDUP if compute_of(config, hardware) == "fp8" else 1.0)
    weights = sum(part.parameters * part.active for part in shape.projections) / shape.layers
    into = ("gate", "up", "gate_up")
    inner = sum(part.parameters * part.active for part in shape.projections if part.role in into) / shape.layers
    adapters = adapter_parameters(shape, targets, config.rank) / shape.layers
    forward, feed_forward = 2 * tokens * weights / frozen, 2 * tokens * inner / frozen
    return forward + 2 * tokens * adapters / rate, feed_forward, forward + 4 * tokens * adapters / rate


def _attention_s(shape: ModelShape, hardware: Hardware, tokens: int, row_tokens: float) -> float:
    """Scores and their product with the values: each token looks at half a row."""
    flops = 2 * tokens * row_tokens * shape.heads * shape.head_dim
    if hardware.kind == "cpu":
        return flops / (hardware.cores * CORE_GFLOPS * 1e9)
    return flops / (hardware.tflops_bf16 * 1e12 * ATTENTION_SHARE)


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
    if not hardware.bandwidth_gbs:
        return 0.0, 0.0
    rate = hardware.bandwidth_gbs * 1e9 * BANDWIDTH_SHARE
    width = WIDTH[compute_of(config, hardware)]
    adapted = sum((part.inputs + part.outputs) * part.count for part in shape.named(targets)) / shape.layers
    moved = FUSED_TRAFFIC if execution.fused else EAGER_TRAFFIC
    forward, backward = (
        (layer * live.layer_bytes + adapter * adapted * tokens * width) / rate
        for layer, adapter in zip(moved, ADAPTER_TRAFFIC, strict=True)
    )
    return forward, backward


def _unpack_s(shape: ModelShape, config: RunConfig, hardware: Hardware) -> float:
    """Dequantising one layer's weights once: reading 4 bits and writing 16."""
    if config.quantization != "nf4" or not hardware.bandwidth_gbs:
        return 0.0
    moved = shape.linear_parameters / shape.layers * (NF4_BYTES + WIDTH[compute_of(config, hardware)])
    return moved / (hardware.bandwidth_gbs * 1e9 * BANDWIDTH_SHARE)


def _loss_s(shape: ModelShape, config: RunConfig, hardware: Hardware, batch: MicroBatch) -> float:
    """The head's matmul and the one back through it."""
    return 4 * batch.supervised * shape.vocab * shape.hidden / flops_per_s(config, hardware)
