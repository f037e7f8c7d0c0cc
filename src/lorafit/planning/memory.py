"""estimate_memory: the peak memory of a run, component by component, each with what it assumes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from lorafit.config import RunConfig
from lorafit.planning.activations import LORAFIT, Activations, Execution, MicroBatch, activations
from lorafit.planning.facts import DataFacts
from lorafit.planning.hardware import GIB, Hardware
from lorafit.planning.shape import ModelShape
from lorafit.planning.targets import resolve_targets

NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes a weight in NF4: 4 bits, an 8-bit scale per 64, and a 32-bit scale of scales per 256 of those."""
QUANT_STATE_BYTES = 2048
"""Code tables and allocation slack of one quantised matrix."""
WIDTH = {"bf16": 2, "fp16": 2, "fp32": 4}
CUDA_CONTEXT_BYTES = 7 * GIB // 8
CPU_PROCESS_BYTES = 5 * GIB // 8
FRAGMENTATION = 0.05
"""Share of what comes and goes that the allocator loses between blocks."""
UNCERTAINTY, UNCERTAINTY_ELSEWHERE = 0.10, 0.30
"""Half-width of the estimate. 17 runs of lorafit's layers (Llama 1B and 8B, Qwen 3, Gemma 2, Phi 3; with and without
recomputation) lay within it on an H200; CPUs and families without a gated feed-forward were only counted."""
DENSE_SHARE = 0.5
"""Share of the memory left that dequantised copies take on a CPU (backbone's own rule)."""
SUPERVISED_SPREAD = 1.25
"""How much more of a micro-batch is supervised than of the mean one."""


@dataclass(frozen=True, slots=True)
class Component:
    """One part of the peak: its size and what that assumes."""

    name: str
    size_bytes: int
    assumes: str


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """The peak and what it is made of; the true peak lies within ± `uncertainty` of it.

    `kept_bytes` and `recomputed_bytes` are the peak with every activation kept and with all of them recomputed.
    """

    components: tuple[Component, ...]
    kept_bytes: int
    recomputed_bytes: int
    uncertainty: float = UNCERTAINTY

    @property
    def peak_bytes(self) -> int:
        """The sum of the components."""
        return _total(self.components)

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
            "components": [
                {"name": part.name, "bytes": part.size_bytes, "assumes": part.assumes} for part in self.components
            ],
        }


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


def estimate_memory(
    shape: ModelShape,
    config: RunConfig,
    hardware: Hardware,
    facts: DataFacts,
    execution: Execution = LORAFIT,
) -> MemoryEstimate:
    """The peak memory of training `config` on `hardware`: packed micro-batches of at most `max_tokens` tokens.

    Activations are recomputed unless `gradient_checkpointing` is off. Raises AdapterError for wrong targets.
    """
    targets = resolve_targets(config.targets, shape)
    width = WIDTH[compute_of(config, hardware)]
    batch = micro_batch(config, facts)
    masks = _mask_bytes(config, hardware, width)
    live = activations(shape, targets, batch, width=width, mask_bytes=masks, execution=execution)
    base = _base(shape, config, hardware, width, execution)
    fixed = [*base, *_adapters(shape, targets, config, hardware), _process(hardware)]
    passing = {recompute: _passing(live, recompute, batch.tokens) for recompute in (False, True)}
    return MemoryEstimate(
        components=(*fixed, *passing[config.gradient_checkpointing != "off"]),
        kept_bytes=_total([*fixed, *passing[False]]),
        recomputed_bytes=_total([*fixed, *passing[True]]),
        uncertainty=_uncertainty(shape, hardware),
    )


def _uncertainty(shape: ModelShape, hardware: Hardware) -> float:
    measured = shape.exact and shape.is_gated and hardware.kind == "cuda"
    return UNCERTAINTY if measured else UNCERTAINTY_ELSEWHERE


def _total(components: Iterable[Component]) -> int:
    return sum(component.size_bytes for component in components)


def _base(
    shape: ModelShape, config: RunConfig, hardware: Hardware, width: int, execution: Execution
) -> list[Component]:
    bits = 8 * width
    outside = shape.embedding_parameters + shape.head_parameters
    wide = 4 if execution.wide_stream else width
    rest = shape.norm_parameters + shape.expert_parameters
    if config.quantization == "nf4":
        matrices = sum(part.count for part in shape.linears)
        size = round((shape.linear_parameters + shape.tower_parameters) * NF4_BYTES) + matrices * QUANT_STATE_BYTES
        base = Component("base, linear layers", size, "NF4 with double quantisation: 0.516 bytes a weight")
    else:
        size = (shape.linear_parameters + shape.tower_parameters) * width
        base = Component("base, linear layers", size, f"{bits}-bit weights")
    frozen = [
        base,
        Component("embeddings and lm_head", outside * wide, f"never quantised: {8 * wide}-bit"),
        Component("norms, biases, stacked experts", rest * width, f"never quantised: {bits}-bit"),
    ]
    return frozen + _dense_copies(shape, config, hardware, frozen, width)


def _dense_copies(
    shape: ModelShape, config: RunConfig, hardware: Hardware, base: list[Component], width: int
) -> list[Component]:
    if hardware.kind != "cpu" or config.quantization != "nf4":
        return []
    left = hardware.memory_bytes - CPU_PROCESS_BYTES - _total(base)
    size = max(0, min(shape.linear_parameters * width, round(left * DENSE_SHARE)))
    return [Component("dequantised copies", size, "kept on a CPU for speed, in at most half of the memory left")]


def _adapters(shape: ModelShape, targets: tuple[str, ...], config: RunConfig, hardware: Hardware) -> list[Component]:
    weights = adapter_parameters(shape, targets, config.rank)
    eight_bit = optimizer_of(config, hardware) != "adamw"
    state = round(weights * (2 + 8 / 256)) if eight_bit else weights * 8
    return [
        Component("adapters", weights * 4, f"{weights:,} weights in fp32"),
        Component("adapter gradients", weights * 4, "fp32"),
        Component("optimizer state", state, f"two moments of AdamW in {8 if eight_bit else 32} bits"),
    ]


def optimizer_of(config: RunConfig, hardware: Hardware) -> str:
    """The optimizer: what is set, else paged 8-bit AdamW on CUDA and AdamW on a CPU."""
    if config.optimizer != "auto":
        return config.optimizer
    return "adamw" if hardware.kind == "cpu" else "paged_adamw_8bit"


def micro_batch(config: RunConfig, facts: DataFacts) -> MicroBatch:
    """The largest micro-batch: `max_tokens`, or a whole step's tokens where that is less."""
    step = config.examples_per_step * facts.longest
    tokens = max(1, min(config.max_tokens, step, facts.tokens or step))
    share = facts.supervised_tokens / facts.tokens if facts.tokens else 1.0
    supervised = min(tokens, round(tokens * share * SUPERVISED_SPREAD))
    return MicroBatch(tokens, supervised, min(tokens, facts.longest))


def _mask_bytes(config: RunConfig, hardware: Hardware, width: int) -> int:
    """Bytes of one entry of a dropout mask: CUDA keeps a boolean, a CPU the scaled noise."""
    if not config.dropout:
        return 0
    return width if hardware.kind == "cpu" else 1


def _passing(live: Activations, recompute: bool, tokens: int) -> list[Component]:
    saved = live.checkpoint_bytes if recompute else live.kept_bytes
    working = live.peak_bytes(recompute) - saved
    how = "each layer's input; the rest is recomputed" if recompute else "everything the backward pass needs"
    slack = round(FRAGMENTATION * (saved + working))
    return [
        Component("activations", saved, f"one micro-batch of {tokens:,} tokens: {how}"),
        Component("loss or one layer's backward", working, "whichever is larger"),
        Component("fragmentation", slack, f"{FRAGMENTATION:.0%} of what comes and goes"),
    ]


def _process(hardware: Hardware) -> Component:
    if hardware.kind == "cpu":
        return Component("process", CPU_PROCESS_BYTES, "Python with torch and transformers loaded")
    return Component("CUDA context", CUDA_CONTEXT_BYTES, "driver, kernels and workspaces")
