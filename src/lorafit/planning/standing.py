"""What is in memory all the time: the frozen base, the adapters with gradients and optimizer, the process itself."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from lorafit.config import RunConfig
from lorafit.planning.hardware import GIB, Hardware
from lorafit.planning.shape import ModelShape

NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes a weight in NF4: 4 bits, an 8-bit scale per 64, and a 32-bit scale of scales per 256 of those."""
QUANT_STATE_BYTES = 2048
"""Code tables and allocation slack of one quantised matrix."""
WIDTH = {"bf16": 2, "fp16": 2, "fp32": 4, "fp8": 2}
"""Bytes of an activation: under fp8 only the operands of frozen matmuls are narrower, and they do not stay."""
ADAM_BYTES, ADAM_8BIT_BYTES = 8, 2 + 8 / 256
"""Bytes of AdamW's two moments for each trained weight: in fp32, or in 8 bits with an fp32 scale per 256 each."""
CUDA_CONTEXT_BYTES = 7 * GIB // 8
CPU_PROCESS_BYTES = 5 * GIB // 8
DENSE_SHARE = 0.5
"""Share of the memory left that dequantised copies take on a CPU (backbone's own rule)."""
OPTIMIZER_SHARE = 0.03
"""Share of a card's memory that AdamW's 32-bit moments may take before 8-bit ones are chosen: those are launched
tensor by tensor, and the paged ones wait for the device every step."""


@dataclass(frozen=True, slots=True)
class Component:
    """One part of the peak: its size and what that assumes. `spare`: it only fills room that nothing else needs."""

    name: str
    size_bytes: int
    assumes: str
    spare: bool = False


def total_bytes(components: Iterable[Component]) -> int:
    """The sum of their sizes."""
    return sum(component.size_bytes for component in components)


def compute_of(config: RunConfig, hardware: Hardware) -> str:
    """The matmul precision: what is set, else bf16 where the card has it, fp16 on other cards, fp32 on a CPU."""
    if config.compute != "auto":
        return config.compute
    if hardware.kind == "cpu":
        return "fp32"
    return "bf16" if hardware.bf16 else "fp16"


def adapter_parameters(shape: ModelShape, targets: tuple[str, ...], rank: int) -> int:
    """Weights in the adapters: r × (in + out) for each target."""
    return sum(rank * (part.inputs + part.outputs) * part.count for part in shape.named(targets))


def optimizer_of(config: RunConfig, hardware: Hardware, weights: int) -> str:
    """The optimizer of so many trainable weights: what is set, else AdamW in 32 bits, fused on CUDA, unless its
    moments would take more than OPTIMIZER_SHARE of the card: then the paged 8-bit one."""
    if config.optimizer != "auto":
        return config.optimizer
    small = weights * ADAM_BYTES <= OPTIMIZER_SHARE * hardware.memory_bytes
    return "adamw" if hardware.kind == "cpu" or small else "paged_adamw_8bit"


def movable_embedding_bytes(shape: ModelShape, config: RunConfig, hardware: Hardware) -> int:
    """Bytes of the input embeddings where they may live in host memory: on CUDA, unless lm_head shares them."""
    if hardware.kind != "cuda" or shape.tied_embeddings:
        return 0
    return shape.embedding_parameters * WIDTH[compute_of(config, hardware)]


def dense_bytes(shape: ModelShape, config: RunConfig, hardware: Hardware, layers: int) -> int:
    """Bytes of the unpacked weights of so many layers: 16 bits each, or in FP8 eight for either direction. None on a
    CPU, which keeps copies in any case, and of a base that is not in 4 bits."""
    if hardware.kind != "cuda" or config.quantization != "nf4":
        return 0
    return round(shape.linear_parameters * WIDTH[compute_of(config, hardware)] * layers / shape.layers)


def standing(
    shape: ModelShape,
    targets: tuple[str, ...],
    config: RunConfig,
    hardware: Hardware,
    *,
    wide: bool = False,
    host_embeddings: bool = False,
    dense: int = 0,
) -> list[Component]:
    """Every part that stays, as large as it is. `wide`: embeddings and lm_head in fp32; `host_embeddings`: the
    input embeddings are elsewhere; `dense`: so many layers' weights are there unpacked too."""
    moved = movable_embedding_bytes(shape, config, hardware) if host_embeddings else 0
    base = _base(shape, config, WIDTH[compute_of(config, hardware)], wide, moved)
    copies = _dense_copies(shape, config, hardware, base, dense)
    return [*base, *copies, *_adapters(shape, targets, config, hardware), _process(hardware)]


def _base(shape: ModelShape, config: RunConfig, width: int, wide: bool, moved_bytes: int) -> list[Component]:
    outside = (shape.embedding_parameters + shape.head_parameters) * (4 if wide else width) - moved_bytes
    where = "; the input embeddings are in host memory" if moved_bytes else ""
    rest = shape.norm_parameters + shape.expert_parameters
    linears = shape.linear_parameters + shape.tower_parameters
    if config.quantization == "nf4":
        matrices = sum(part.count for part in shape.linears)
        size = round(linears * NF4_BYTES) + matrices * QUANT_STATE_BYTES
        base = Component("base, linear layers", size, "NF4 with double quantisation: 0.516 bytes a weight")
    else:
        base = Component("base, linear layers", linears * width, f"{8 * width}-bit weights")
    return [
        base,
        Component("embeddings and lm_head", outside, f"never quantised: {8 * (4 if wide else width)}-bit{where}"),
        Component("norms, biases, stacked experts", rest * width, f"never quantised: {8 * width}-bit"),
    ]


def _dense_copies(
    shape: ModelShape, config: RunConfig, hardware: Hardware, base: list[Component], layers: int
) -> list[Component]:
    if config.quantization != "nf4":
        return []
    if hardware.kind != "cpu":
        size = dense_bytes(shape, config, hardware, layers)
        why = f"the weights of {layers} of {shape.layers} layers lie there unpacked too, for speed"
        return [Component("dequantised copies", size, why, spare=True)] if size else []
    left = hardware.memory_bytes - CPU_PROCESS_BYTES - total_bytes(base)
    dense = shape.linear_parameters * WIDTH[compute_of(config, hardware)]
    size = max(0, min(dense, round(left * DENSE_SHARE)))
    return [Component("dequantised copies", size, "kept on a CPU for speed, in at most half of the memory left")]


def _adapters(shape: ModelShape, targets: tuple[str, ...], config: RunConfig, hardware: Hardware) -> list[Component]:
    weights = adapter_parameters(shape, targets, config.rank)
    eight_bit = optimizer_of(config, hardware, weights) != "adamw"
    state = round(weights * (ADAM_8BIT_BYTES if eight_bit else ADAM_BYTES))
    return [
        Component("adapters", weights * 4, f"{weights:,} weights in fp32"),
        Component("adapter gradients", weights * 4, "fp32"),
        Component("optimizer state", state, f"two moments of AdamW in {8 if eight_bit else 32} bits"),
    ]


def _process(hardware: Hardware) -> Component:
    if hardware.kind == "cpu":
        return Component("process", CPU_PROCESS_BYTES, "Python with torch and transformers loaded")
    return Component("CUDA context", CUDA_CONTEXT_BYTES, "driver, kernels and workspaces")
