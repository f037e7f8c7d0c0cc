"""Decisions: the value, reason and source of every planned setting, and the decision matrix."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from lorafit.config import Resolved, RunConfig
from lorafit.config.foreign_text import size_in_words
from lorafit.config.memory_policy import MemoryPolicy
from lorafit.config.resolve import usual_alpha
from lorafit.config.run_config import Goal
from lorafit.memory.execution_plan import ExecutionPlan, estimate_memory, memory_of, plan_execution
from lorafit.memory.inputs import PlanInputs
from lorafit.planning.forecast import forecast
from lorafit.planning.full_method import full_optimizer, learning_rate, method_choice
from lorafit.planning.several_gpus import base_sharding
from lorafit.shapes import ModelShape

Method = Literal["QLoRA", "LoRA", "full fine-tuning"]


@dataclass(frozen=True, slots=True)
class Case:
    """Hold the input of the decision matrix.

    Attributes:
        rows: Training rows.
        goal: The setting `goal`.
        fits_16bit: Whether a 16-bit base would fit.
    """

    rows: int
    goal: Goal
    fits_16bit: bool


@dataclass(frozen=True, slots=True)
class Rule:
    """Hold one row of the matrix: its condition and its choice.

    Attributes:
        method: Method it chooses.
        rank: Rank it chooses; 0 trains every weight.
        quantization: Quantization of the base it chooses.
        rank_reason: Reason for the rank.
        base_reason: Reason for the quantization.
        least: Fewest rows it applies to.
        most: Most rows it applies to; None for any number.
        goal: Goal it applies to; None for any goal.
        needs_16bit: Whether it applies only if the base fits in 16 bits.
    """

    method: Method
    rank: int
    quantization: Literal["nf4", "none"]
    rank_reason: str
    base_reason: str
    least: int = 0
    most: int | None = None
    goal: Goal | None = None
    needs_16bit: bool = False

    def holds(self, case: Case) -> bool:
        """Return whether this row applies to `case`. The first row that applies decides."""
        enough = case.rows >= self.least and (self.most is None or case.rows <= self.most)
        return enough and self.goal in (None, case.goal) and (case.fits_16bit or not self.needs_16bit)

    @property
    def when(self) -> str:
        """Condition of the row in words."""
        if self.most is None:
            rows = f"more than {self.least - 1:,} rows" if self.least else "any number of rows"
        else:
            rows = f"{self.least:,} to {self.most:,} rows" if self.least else f"up to {self.most:,} rows"
        goal = f", goal {self.goal}" if self.goal else ""
        return rows + goal + (", 16-bit base fits" if self.needs_16bit else "")


SMALL, MEDIUM, HUGE = 5_000, 50_000, 100_000
"""Limits of the matrix in rows. Below SMALL is little data, up to MEDIUM the usual, above HUGE enough to train all."""

MATRIX: tuple[Rule, ...] = (
    Rule("full fine-tuning", 0, "none", "every weight trains", "nothing is frozen, so nothing is quantized",
         least=HUGE + 1, goal="accuracy"),
    Rule("QLoRA", 8, "nf4", "the budget goal takes the smallest adapter that learns",
         "the budget goal takes a 4-bit base, which needs the smallest GPU", goal="budget"),
    Rule("QLoRA", 8, "nf4", "a larger adapter would memorize them",
         "few rows limit accuracy more than a 4-bit base does", most=SMALL - 1),
    Rule("LoRA", 16, "none", "the usual amount of data", "the base fits in 16 bits, so quantization loses nothing",
         least=SMALL, most=MEDIUM, needs_16bit=True),
    Rule("QLoRA", 16, "nf4", "the usual amount of data", "the base does not fit in 16 bits",
         least=SMALL, most=MEDIUM),
    Rule("LoRA", 32, "none", "they can fill a larger adapter",
         "the base fits in 16 bits, so quantization loses nothing", least=MEDIUM + 1, needs_16bit=True),
    Rule("QLoRA", 32, "nf4", "they can fill a larger adapter", "the base does not fit in 16 bits",
         least=MEDIUM + 1),
)  # fmt: skip

FULL = MATRIX[0]
"""The row that trains every weight. The setting `method` chooses it too."""

SERVING: Mapping[Goal, tuple[Literal["merged", "adapters"], str]] = {
    "latency": ("merged", "a model with the adapter merged in answers fastest"),
    "tenants": ("adapters", "one base in memory serves many small adapters"),
}
DEFAULT_SERVING: tuple[Literal["merged", "adapters"], str] = ("merged", "every server can load a merged model")


def choose(case: Case) -> Rule:
    """Return the first row of the matrix that applies to `case`."""
    rule = next((rule for rule in MATRIX if rule.holds(case)), None)
    assert rule is not None, case
    return rule


def rank_limit(rows: int) -> int:
    """Return the largest rank that `rows` rows can fill. It is 8 below 5,000, 16 to 50,000, 32 above."""
    return choose(Case(rows, "balanced", False)).rank


@dataclass(frozen=True, slots=True)
class Option:
    """Hold one row of the matrix with its memory, time and cost. Ranges are (low, high).

    Attributes:
        method: Method of the row.
        rank: Rank of the row; 0 trains every weight.
        quantization: Quantization of the base.
        when: Condition of the row in words.
        peak_bytes: Peak memory, without CUDA graphs and dequantized weights that only fill spare memory.
        fits: Whether the peak fits the hardware.
        hardware: Name of the device.
        gpus: Number of devices.
        time_s: Seconds of the whole run.
        cost_usd: Price of the whole run.
        chosen: Whether the plan chose this row.
    """

    method: str
    rank: int
    quantization: str
    when: str
    peak_bytes: int
    fits: bool
    hardware: str
    gpus: int
    time_s: tuple[float, float]
    cost_usd: tuple[float, float]
    chosen: bool

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready mapping."""
        fields = asdict(self)
        return fields | {
            "time_s": [round(bound, 1) for bound in self.time_s],
            "cost_usd": [round(bound, 4) for bound in self.cost_usd],
        }


def price_options(inputs: PlanInputs, chosen: Rule) -> tuple[Option, ...]:
    """Return every row of the matrix with its memory, time and cost.

    `inputs` hold the planned settings, except for the memory policy: that is the user's, so that on auto each row
    gets its own.
    """
    return tuple(_option(rule, inputs, rule is chosen) for rule in MATRIX)


def _option(rule: Rule, inputs: PlanInputs, chosen: bool) -> Option:
    rank = max(rule.rank, 1)
    changes: dict[str, Any] = {"rank": rank, "alpha": 2.0 * rank, "quantization": rule.quantization}
    changes |= {} if rule.rank else {"optimizer": "auto"}
    run = forecast(inputs if chosen else inputs.with_settings(method="lora", **changes), full=not rule.rank)
    return Option(
        method=rule.method,
        rank=rule.rank,
        quantization=rule.quantization,
        when=rule.when,
        peak_bytes=run.memory.needed_bytes,
        fits=run.memory.needed_bytes <= run.hardware.memory_bytes,
        hardware=run.hardware.name,
        gpus=run.gpus,
        time_s=run.duration.time_s,
        cost_usd=run.cost_usd,
        chosen=chosen,
    )


ADAPTER_KEYS = ("method", "rank", "alpha", "quantization", "targets")
"""Settings that imply training an adapter. When one is set, the matrix does not choose full fine-tuning."""
QUANTIZED = ("nf4", "fp4")


@dataclass(frozen=True, slots=True)
class Decision:
    """Hold one planned setting.

    Attributes:
        key: The setting.
        value: Its value.
        reason: Reason for the value.
        source: `plan`, or the `recipe` or `flag` that set it.
    """

    key: str
    value: Any
    reason: str
    source: str = "plan"

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready mapping."""
        return {"key": self.key, "value": self.value, "reason": self.reason, "source": self.source}


@dataclass(frozen=True, slots=True)
class Decided:
    """Hold the chosen row of the matrix and every decision."""

    rule: Rule
    decisions: tuple[Decision, ...]

    @property
    def is_full(self) -> bool:
        """True when the matrix chose to train every weight."""
        return self.rule.method == "full fine-tuning"

    @property
    def method(self) -> str:
        """Method: QLoRA over a 4-bit base, LoRA over another, or full fine-tuning."""
        if self.is_full:
            return self.rule.method
        quantization = next(decision.value for decision in self.decisions if decision.key == "quantization")
        return "QLoRA" if quantization == "nf4" else "LoRA"


def decide(resolved: Resolved, inputs: PlanInputs) -> Decided:
    """Return the matrix's row for this data, and a decision for each planned setting.

    Settings of the user keep their values.
    """
    rule = _rule(resolved, inputs)
    decisions: list[Decision] = []
    inputs = inputs.with_settings(method="lora" if rule.rank else "full")

    def settle(key: str, value: Any, reason: str) -> None:
        nonlocal inputs
        if resolved.is_set(key):
            decision = Decision(key, getattr(inputs.config, key), "set by you", resolved.sources[key].value)
        else:
            decision = Decision(key, value, reason)
            inputs = inputs.with_settings(**{key: value})
        decisions.append(decision)

    settle("method", *method_choice(inputs, rule.rank_reason))
    if rule.rank:
        settle("rank", rule.rank, f"{inputs.stats.rows:,} row{'s' * (inputs.stats.rows != 1)}: {rule.rank_reason}")
        settle("alpha", usual_alpha(inputs.config), _alpha_reason(inputs.config))
    settle("quantization", *_quantization(inputs.config, rule, inputs.shape))
    settle("compute", *_compute(inputs))
    settle("compile", *_compile(inputs))
    settle("lr", *learning_rate(inputs))
    settle("optimizer", *_optimizer(inputs, rule))
    if not inputs.is_full:
        settle("shard_base", *base_sharding(inputs))
    settle("memory_policy", *_activations(inputs))
    settle("serving", *SERVING.get(inputs.config.goal, DEFAULT_SERVING))
    return Decided(rule, tuple(decisions))


def _rule(resolved: Resolved, inputs: PlanInputs) -> Rule:
    rows, goal = inputs.stats.rows, inputs.config.goal
    if resolved.is_set("method") and inputs.is_full:
        return FULL
    if any(resolved.is_set(key) for key in ADAPTER_KEYS) and goal == "accuracy":
        rows = min(rows, HUGE)
    return choose(Case(rows, goal, fits_16bit(inputs)))


def fits_16bit(inputs: PlanInputs) -> bool:
    """Return True when the base fits in 16 bits, with every layer recomputed.

    The estimate's error must fit as well.
    """
    if inputs.shape.quantized or inputs.config.compute == "fp8":
        return False
    changes = {"quantization": "none", "memory_policy": "recompute"}
    memory = estimate_memory(inputs.with_settings(**changes))
    return memory.peak_bytes * (1 + memory.uncertainty) <= inputs.hardware.memory_bytes


def _quantization(config: RunConfig, rule: Rule, shape: ModelShape) -> tuple[str, str]:
    if shape.quantized in QUANTIZED and rule.rank:
        return "nf4", f"the base is already in 4 bits ({shape.quantized})"
    if shape.linear_class != "Linear":
        return "none", f"{shape.family}'s {shape.linear_class} layers are not supported in 4 bits"
    if config.compute == "fp8" and rule.rank:
        return "nf4", "fp8 matmuls need 4-bit weights"
    return rule.quantization, rule.base_reason


def _compute(inputs: PlanInputs) -> tuple[str, str]:
    value, name = inputs.with_settings(compute="auto").compute, inputs.hardware.name
    if inputs.is_full and value == "fp16":
        return "fp32", f"{name} does not support bf16, and weights in fp16 lose small updates"
    reasons = {
        "bf16": f"{name} supports bf16, whose range never overflows{_fp8_hint(inputs)}",
        "fp16": f"{name} does not support bf16",
        "fp32": "fp32 is the fast and exact precision of a CPU",
    }
    return value, reasons[value]


def _fp8_hint(inputs: PlanInputs) -> str:
    """Return the hint at fp8. The ratios are those of an 8B base on an H200 (docs/performance.md)."""
    if inputs.hardware.fp8 and inputs.in_4_bits:
        return "; compute=fp8 is faster (8B on an H200: 1.4 to 1.5 times)"
    return ""


def _compile(inputs: PlanInputs) -> tuple[str, str]:
    if inputs.on_cuda:
        return "on", "compiling once for all decoder layers fuses their small operations"
    return "off", "on a CPU compiling takes longer than it saves"


def _optimizer(inputs: PlanInputs, rule: Rule) -> tuple[str, str]:
    if not rule.rank:
        return full_optimizer(inputs)
    value = inputs.with_settings(optimizer="auto").optimizer
    if not inputs.on_cuda:
        return value, "the 8-bit optimizers need CUDA"
    state = f"{size_in_words(8 * inputs.adapter_parameters)} of {size_in_words(inputs.hardware.memory_bytes)}"
    reasons = {
        "paged_adamw_8bit": f"32-bit moments take {state}; 8-bit ones are paged to the host when memory is short",
        "adamw": f"32-bit moments take {state}, and one fused kernel updates them",
    }
    return value, reasons[value]


def _activations(inputs: PlanInputs) -> tuple[str, str]:
    plan = plan_execution(inputs)
    memory = memory_of(plan, inputs)
    policy = in_words(plan, inputs.shape.layers)
    speed = f"{speed_in_words(plan.tokens_per_s)} predicted; " if inputs.on_cuda else ""
    available = size_in_words(inputs.hardware.memory_bytes)
    peak = f"{size_in_words(memory.peak_bytes)} ± {memory.uncertainty:.0%} of {available}"
    failure = "" if memory.fits(inputs.hardware) else ", and no policy needs less"
    return str(plan.policy), f"{policy}: {speed}{peak}{failure}"


def speed_in_words(tokens_per_s: float) -> str:
    """Return a speed in words, such as `18.2 k tok/s`."""
    if tokens_per_s >= 1000:
        return f"{tokens_per_s / 1000:,.1f} k tok/s"
    return f"{tokens_per_s:.3g} tok/s"


def in_words(plan: ExecutionPlan, layers: int) -> str:
    """Return the plan's memory policy in words."""
    policy = plan.policy
    parts = (
        ["every activation stays on the device"]
        if not (policy.recompute_layers or policy.recompute_mlp_layers or policy.offloaded_layers)
        else []
    )
    if policy.recompute_layers:
        parts.append(f"{policy.recompute_layers} of {layers} layers are recomputed")
    if policy.recompute_mlp_layers:
        parts.append(f"{policy.recompute_mlp_layers} of {layers} layers recompute their feed-forward")
    if policy.offloaded_layers or policy.host_embeddings:
        parts.append(_on_the_host(policy, plan.host_bytes))
    if policy.dequantized_layers:
        parts.append(f"spare memory holds the dequantized weights of {policy.dequantized_layers} of {layers} layers")
    if plan.graph_bytes:
        parts.append(f"micro-batches of up to {policy.cuda_graph_max_tokens:,} tokens run as CUDA graphs")
    if policy.micro_tokens:
        parts.append(f"micro-batches have up to {policy.micro_tokens:,} tokens")
    return ", ".join(parts)


def _on_the_host(policy: MemoryPolicy, size_bytes: int) -> str:
    layers = policy.offloaded_layers
    offloaded = [f"the activations of {layers} {'layers' if layers > 1 else 'layer'}"] if layers else []
    if policy.host_embeddings:
        offloaded.append("the input embeddings")
    return f"{' and '.join(offloaded)} are in host memory ({size_in_words(size_bytes)})"


def _alpha_reason(config: RunConfig) -> str:
    if config.rslora:
        return "twice the root of the rank: the delta is scaled by alpha / √rank = 2"
    return "twice the rank: the delta is scaled by alpha / rank = 2"
