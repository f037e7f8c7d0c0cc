"""decide: a value, a reason and a source for every setting the plan may choose."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lorafit.config import Resolved, RunConfig
from lorafit.planning.facts import DataFacts
from lorafit.planning.hardware import GIB, Hardware
from lorafit.planning.matrix import DEFAULT_SERVING, HUGE, SERVING, Case, Rule, choose
from lorafit.planning.memory import compute_of, estimate_memory, optimizer_of
from lorafit.planning.shape import ModelShape

ADAPTER_KEYS = ("rank", "alpha", "quantization", "targets")
"""Who sets one of these wants an adapter, whatever the matrix says."""
QUANTIZED = ("nf4", "fp4")


@dataclass(frozen=True, slots=True)
class Decision:
    """One setting: its value, why, and who decided (`plan`, or the `recipe` or `flag` that set it)."""

    key: str
    value: Any
    reason: str
    source: str = "plan"

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready mapping."""
        return {"key": self.key, "value": self.value, "reason": self.reason, "source": self.source}


@dataclass(frozen=True, slots=True)
class Decided:
    """The row of the matrix that spoke, and every decision."""

    rule: Rule
    decisions: tuple[Decision, ...]

    @property
    def is_full(self) -> bool:
        """True when the matrix asks for training every weight."""
        return self.rule.method == "full fine-tuning"

    @property
    def method(self) -> str:
        """QLoRA over a 4-bit base, LoRA over another, or full fine-tuning."""
        if self.is_full:
            return self.rule.method
        quantization = next(decision.value for decision in self.decisions if decision.key == "quantization")
        return "QLoRA" if quantization == "nf4" else "LoRA"


def decide(resolved: Resolved, facts: DataFacts, shape: ModelShape, hardware: Hardware) -> Decided:
    """The matrix's row for this data, and each planned setting; what a recipe or flag set is kept."""
    rule = _rule(resolved, facts, shape, hardware)
    config = resolved.config
    decisions: list[Decision] = []

    def settle(key: str, value: Any, reason: str) -> None:
        nonlocal config
        if resolved.is_set(key):
            decision = Decision(key, getattr(config, key), "set by you", resolved.sources[key].value)
        else:
            decision = Decision(key, value, reason)
            config = config.model_copy(update={key: value})
        decisions.append(decision)

    if rule.rank:
        settle("rank", rule.rank, f"{facts.rows:,} rows: {rule.rank_reason}")
        settle("alpha", 2.0 * config.rank, "twice the rank: the delta is scaled by alpha / rank = 2")
    settle("quantization", *_quantization(rule, shape))
    settle("compute", *_compute(config, hardware))
    settle("optimizer", *_optimizer(config, hardware, rule))
    settle("gradient_checkpointing", *_checkpointing(config, facts, shape, hardware, rule))
    settle("serving", *SERVING.get(config.goal, DEFAULT_SERVING))
    return Decided(rule, tuple(decisions))


def _rule(resolved: Resolved, facts: DataFacts, shape: ModelShape, hardware: Hardware) -> Rule:
    config = resolved.config
    rows = facts.rows
    if any(resolved.is_set(key) for key in ADAPTER_KEYS) and config.goal == "accuracy":
        rows = min(rows, HUGE)
    return choose(Case(rows, config.goal, fits_16bit(config, facts, shape, hardware)))


def fits_16bit(config: RunConfig, facts: DataFacts, shape: ModelShape, hardware: Hardware) -> bool:
    """Whether the base fits unquantised, with room for the estimate's error and activations recomputed."""
    if shape.quantized:
        return False
    changes = {"quantization": "none", "gradient_checkpointing": "on"}
    memory = estimate_memory(shape, config.model_copy(update=changes), hardware, facts)
    return memory.peak_bytes * (1 + memory.uncertainty) <= hardware.memory_bytes


def _quantization(rule: Rule, shape: ModelShape) -> tuple[str, str]:
    if shape.quantized in QUANTIZED:
        return "nf4", f"the base is already in 4 bits ({shape.quantized})"
    if shape.linear_class == "Conv1D":
        return "none", f"{shape.family}'s Conv1D layers are not supported in 4 bits"
    return rule.quantization, rule.base_reason


def _compute(config: RunConfig, hardware: Hardware) -> tuple[str, str]:
    value = compute_of(config.model_copy(update={"compute": "auto"}), hardware)
    reasons = {
        "bf16": f"{hardware.name} multiplies in bf16, whose range never overflows",
        "fp16": f"{hardware.name} has no bf16 arithmetic",
        "fp32": "a CPU: fp32 is its fast and exact precision",
    }
    return value, reasons[value]


def _optimizer(config: RunConfig, hardware: Hardware, rule: Rule) -> tuple[str, str]:
    if not rule.rank:
        return "adamw", "moments in 32 bits, sharded over the cards"
    value = optimizer_of(config.model_copy(update={"optimizer": "auto"}), hardware)
    reasons = {
        "paged_adamw_8bit": "moments in 8 bits, paged to the host when memory is short",
        "adamw": "a CPU: the 8-bit optimizers need CUDA",
    }
    return value, reasons[value]


def _checkpointing(
    config: RunConfig, facts: DataFacts, shape: ModelShape, hardware: Hardware, rule: Rule
) -> tuple[str, str]:
    if not rule.rank:
        return "on", "activations of every weight's gradient would not fit"
    memory = estimate_memory(shape, config, hardware, facts)
    kept, room = memory.kept_bytes, hardware.memory_bytes
    needed = f"about {kept / GIB:.1f} GiB ± {memory.uncertainty:.0%} of {room / GIB:.1f} GiB"
    if kept * (1 + memory.uncertainty) <= room:
        return "off", f"every activation fits: {needed}"
    return "on", f"keeping every activation would need {needed}"
