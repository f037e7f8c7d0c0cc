"""Static memory: the frozen base, the adapters with gradients and optimizer, and the process itself."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from lorafit.hardware.device import GIB
from lorafit.memory.inputs import ADAM_8BIT_BYTES, ADAM_BYTES, PlanInputs

NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes a weight in NF4: 4 bits, an 8-bit scale per 64, and a 32-bit scale of scales per 256 of those."""
QUANT_STATE_BYTES = 2048
"""Code tables and allocation slack of one quantised matrix."""
CUDA_CONTEXT_BYTES = 7 * GIB // 8
CPU_PROCESS_BYTES = 5 * GIB // 8
DENSE_SHARE = 0.5
"""Share of the memory left that dequantised copies take on a CPU (backbone's own rule)."""


@dataclass(frozen=True, slots=True)
class Component:
    """Hold one part of the peak: its size and what that assumes. A `spare` part only fills unused memory."""

    name: str
    size_bytes: int
    assumes: str
    spare: bool = False


def total_bytes(components: Iterable[Component]) -> int:
    """Return the sum of their sizes."""
    return sum(component.size_bytes for component in components)


def movable_embedding_bytes(inputs: PlanInputs) -> int:
    """Return the bytes of input embeddings that may live in host memory: on CUDA, unless lm_head shares them."""
    if not inputs.on_cuda or inputs.shape.tied_embeddings:
        return 0
    return inputs.shape.embedding_parameters * inputs.width


def dense_bytes(inputs: PlanInputs, layers: int) -> int:
    """Return the bytes of the dequantized weights of so many layers: 16 bits each, in FP8 eight for each direction.

    A CPU keeps its copies in any case, and a base that is not in 4 bits needs none.
    """
    if not inputs.on_cuda or not inputs.in_4_bits:
        return 0
    return round(inputs.shape.linear_parameters * inputs.width * layers / inputs.shape.layers)


def static_memory(
    inputs: PlanInputs, *, wide: bool = False, host_embeddings: bool = False, dequantized_layers: int = 0
) -> list[Component]:
    """Return every part that stays for the whole run.

    `wide` holds embeddings and lm_head in fp32, `host_embeddings` moves the input embeddings to host memory, and
    `dequantized_layers` counts the layers whose weights are there dequantized too.
    """
    base = _base(inputs, wide, movable_embedding_bytes(inputs) if host_embeddings else 0)
    return [*base, *_dense_copies(inputs, base, dequantized_layers), *_adapters(inputs), _process(inputs)]


def _base(inputs: PlanInputs, wide: bool, moved_bytes: int) -> list[Component]:
    shape, width = inputs.shape, inputs.width
    outside_width = 4 if wide else width
    outside = (shape.embedding_parameters + shape.head_parameters) * outside_width - moved_bytes
    where = "; the input embeddings are in host memory" if moved_bytes else ""
    linears = shape.linear_parameters + shape.tower_parameters
    if inputs.in_4_bits:
        matrices = sum(part.count for part in shape.linears)
        size = round(linears * NF4_BYTES) + matrices * QUANT_STATE_BYTES
        base = Component("base, linear layers", size, "NF4 with double quantisation: 0.516 bytes a weight")
    else:
        base = Component("base, linear layers", linears * width, f"{8 * width}-bit weights")
    rest = (shape.norm_parameters + shape.expert_parameters) * width
    return [
        base,
        Component("embeddings and lm_head", outside, f"never quantised: {8 * outside_width}-bit{where}"),
        Component("norms, biases, stacked experts", rest, f"never quantised: {8 * width}-bit"),
    ]


def _dense_copies(inputs: PlanInputs, base: list[Component], layers: int) -> list[Component]:
    if not inputs.in_4_bits:
        return []
    if inputs.on_cuda:
        size = dense_bytes(inputs, layers)
        why = f"the weights of {layers} of {inputs.shape.layers} layers lie there unpacked too, for speed"
        return [Component("dequantised copies", size, why, spare=True)] if size else []
    left = inputs.hardware.memory_bytes - CPU_PROCESS_BYTES - total_bytes(base)
    size = max(0, min(inputs.shape.linear_parameters * inputs.width, round(left * DENSE_SHARE)))
    return [Component("dequantised copies", size, "kept on a CPU for speed, in at most half of the memory left")]


def _adapters(inputs: PlanInputs) -> list[Component]:
    weights, eight_bit = inputs.adapter_parameters, inputs.optimizer != "adamw"
    state = round(weights * (ADAM_8BIT_BYTES if eight_bit else ADAM_BYTES))
    return [
        Component("adapters", weights * 4, f"{weights:,} weights in fp32"),
        Component("adapter gradients", weights * 4, "fp32"),
        Component("optimizer state", state, f"two moments of AdamW in {8 if eight_bit else 32} bits"),
    ]


def _process(inputs: PlanInputs) -> Component:
    if inputs.on_cuda:
        return Component("CUDA context", CUDA_CONTEXT_BYTES, "driver, kernels and workspaces")
    return Component("process", CPU_PROCESS_BYTES, "Python with torch and transformers loaded")
