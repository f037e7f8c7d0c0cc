"""decide: a value, a reason and a source for every setting the plan may choose; the decision matrix."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from lorafit.config import Resolved, RunConfig
from lorafit.config.foreign_text import size_in_words
from lorafit.config.memory_policy import MemoryPolicy
from lorafit.config.run_config import Goal
from lorafit.memory.execution_plan import ExecutionPlan, estimate_memory, memory_of, plan_execution
from lorafit.memory.inputs import PlanInputs
from lorafit.planning.forecast import forecast
from lorafit.shapes import ModelShape

Method = Literal["QLoRA", "LoRA", "full fine-tuning"]


@dataclass(frozen=True, slots=True)
class Case:
    """Hold the matrix's question: training rows, the goal, and whether a 16-bit base would fit."""

    rows: int
    goal: Goal
    fits_16bit: bool


@dataclass(frozen=True, slots=True)
class Rule:
    """Hold one row of the matrix: its condition and its choice.

    It applies from `least` to `most` rows, for `goal` (None: any), and with `needs_16bit` only if the base fits in 16
    bits.
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
        """Whether this row speaks for `case`; the first one that does decides."""
        enough = case.rows >= self.least and (self.most is None or case.rows <= self.most)
        return enough and self.goal in (None, case.goal) and (case.fits_16bit or not self.needs_16bit)

    @property
    def when(self) -> str:
        """The row's condition in words."""
        if self.most is None:
            rows = f"more than {self.least - 1:,} rows" if self.least else "any number of rows"
        else:
            rows = f"{self.least:,} to {self.most:,} rows" if self.least else f"up to {self.most:,} rows"
        goal = f", goal {self.goal}" if self.goal else ""
        return rows + goal + (", 16-bit base fits" if self.needs_16bit else "")


SMALL, MEDIUM, HUGE = 5_000, 50_000, 100_000
"""Rows: below SMALL a little data, up to MEDIUM the usual amount, above HUGE enough for every weight."""

MATRIX: tuple[Rule, ...] = (
    Rule("full fine-tuning", 0, "none", "every weight trains", "nothing is frozen, so nothing is quantised",
         least=HUGE + 1, goal="accuracy"),
    Rule("QLoRA", 8, "nf4", "a strict budget: the smallest adapter that learns",
         "a strict budget: a 4-bit base needs the smallest GPU", goal="budget"),
    Rule("QLoRA", 8, "nf4", "a larger adapter would memorise so few rows",
         "4 bits cost less accuracy than these rows add", most=SMALL - 1),
    Rule("LoRA", 16, "none", "the usual amount of data", "the base fits in 16 bits, so nothing is lost to quantisation",
         least=SMALL, most=MEDIUM, needs_16bit=True),
    Rule("QLoRA", 16, "nf4", "the usual amount of data", "the base does not fit in 16 bits",
         least=SMALL, most=MEDIUM),
    Rule("LoRA", 32, "none", "so many rows can fill a larger adapter",
         "the base fits in 16 bits, so nothing is lost to quantisation", least=MEDIUM + 1, needs_16bit=True),
    Rule("QLoRA", 32, "nf4", "so many rows can fill a larger adapter", "the base does not fit in 16 bits",
         least=MEDIUM + 1),
)  # fmt: skip

SERVING: Mapping[Goal, tuple[Literal["merged", "adapters"], str]] = {
    "latency": ("merged", "one model with the adapter merged in answers fastest"),
    "tenants": ("adapters", "one base in memory serves many small adapters"),
}
DEFAULT_SERVING: tuple[Literal["merged", "adapters"], str] = ("merged", "one model, served by anything")


def choose(case: Case) -> Rule:
    """The first row of the matrix that holds."""
    rule = next((rule for rule in MATRIX if rule.holds(case)), None)
    assert rule is not None, case
    return rule


def rank_limit(rows: int) -> int:
    """The largest rank that so many rows can fill: 8 below 5,000, 16 to 50,000, 32 above."""
    return choose(Case(rows, "balanced", False)).rank


@dataclass(frozen=True, slots=True)
class Option:
    """One row of the matrix with what it would take here; ranges are (low, high), `rank` 0 means every weight.

    `peak_bytes` are those that it needs: graphs and unpacked weights, which take what is left over, are not among them.
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
        """A JSON-ready mapping."""
        fields = asdict(self)
        return fields | {
            "time_s": [round(bound, 1) for bound in self.time_s],
            "cost_usd": [round(bound, 4) for bound in self.cost_usd],
        }


def price_options(inputs: PlanInputs, chosen: Rule) -> tuple[Option, ...]:
    """Price every row of the matrix in memory, time and cost.

    `inputs` hold the planned settings, but the memory policy that was asked for: each row chooses its own.
    """
    return tuple(_option(rule, inputs, rule is chosen) for rule in MATRIX)


def _option(rule: Rule, inputs: PlanInputs, chosen: bool) -> Option:
    rank = max(rule.rank, 1)
    changes = {"rank": rank, "alpha": 2.0 * rank, "quantization": rule.quantization}
    run = forecast(inputs if chosen else inputs.with_settings(**changes), full=not rule.rank)
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


ADAPTER_KEYS = ("rank", "alpha", "quantization", "targets")
"""Settings that ask for an adapter when somebody sets one, whatever the matrix says."""
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


def decide(resolved: Resolved, inputs: PlanInputs) -> Decided:
    """Choose the matrix's row for this data, and a value for each planned setting that nobody set."""
    rule = _rule(resolved, inputs)
    decisions: list[Decision] = []

    def settle(key: str, value: Any, reason: str) -> None:
        nonlocal inputs
        if resolved.is_set(key):
            decision = Decision(key, getattr(inputs.config, key), "set by you", resolved.sources[key].value)
        else:
            decision = Decision(key, value, reason)
            inputs = inputs.with_settings(**{key: value})
        decisions.append(decision)

    if rule.rank:
        settle("rank", rule.rank, f"{inputs.stats.rows:,} rows: {rule.rank_reason}")
        settle("alpha", 2.0 * inputs.config.rank, "twice the rank: the delta is scaled by alpha / rank = 2")
    settle("quantization", *_quantization(inputs.config, rule, inputs.shape))
    settle("compute", *_compute(inputs))
    settle("compile", *_compile(inputs))
    settle("optimizer", *_optimizer(inputs, rule))
    settle("memory_policy", *_activations(inputs, rule))
    settle("serving", *SERVING.get(inputs.config.goal, DEFAULT_SERVING))
    return Decided(rule, tuple(decisions))


def _rule(resolved: Resolved, inputs: PlanInputs) -> Rule:
    rows, goal = inputs.stats.rows, inputs.config.goal
    if any(resolved.is_set(key) for key in ADAPTER_KEYS) and goal == "accuracy":
        rows = min(rows, HUGE)
    return choose(Case(rows, goal, fits_16bit(inputs)))


def fits_16bit(inputs: PlanInputs) -> bool:
    """True when the base fits unquantised, with the estimate's error to spare and every layer recomputed."""
    if inputs.shape.quantized or inputs.config.compute == "fp8":
        return False
    changes = {"quantization": "none", "memory_policy": "recompute"}
    memory = estimate_memory(inputs.with_settings(**changes))
    return memory.peak_bytes * (1 + memory.uncertainty) <= inputs.hardware.memory_bytes


def _quantization(config: RunConfig, rule: Rule, shape: ModelShape) -> tuple[str, str]:
    if shape.quantized in QUANTIZED:
        return "nf4", f"the base is already in 4 bits ({shape.quantized})"
    if shape.linear_class == "Conv1D":
        return "none", f"{shape.family}'s Conv1D layers are not supported in 4 bits"
    if config.compute == "fp8" and rule.rank:
        return "nf4", "fp8 matmuls take their weights from 4 bits"
    return rule.quantization, rule.base_reason


def _compute(inputs: PlanInputs) -> tuple[str, str]:
    value, name = inputs.with_settings(compute="auto").compute, inputs.hardware.name
    reasons = {
        "bf16": f"{name} multiplies in bf16, whose range never overflows{_beside_bf16(inputs)}",
        "fp16": f"{name} has no bf16 arithmetic",
        "fp32": "a CPU: fp32 is its fast and exact precision",
    }
    return value, reasons[value]


def _beside_bf16(inputs: PlanInputs) -> str:
    """Return the alternative to bf16; the ratios are an H200's, of an 8B base (docs/performance.md)."""
    if inputs.hardware.fp8 and inputs.in_4_bits:
        return "; compute=fp8 is faster (8B on an H200: 1.4 to 1.5 times), if you choose it"
    return ""


def _compile(inputs: PlanInputs) -> tuple[str, str]:
    if inputs.on_cuda:
        return "on", "the decoder layer is compiled once and used for all: its small operations become few"
    return "off", "a CPU: compiling takes longer than it saves"


def _optimizer(inputs: PlanInputs, rule: Rule) -> tuple[str, str]:
    if not rule.rank:
        return "adamw", "moments in 32 bits, sharded over the GPUs"
    value = inputs.with_settings(optimizer="auto").optimizer
    if not inputs.on_cuda:
        return value, "a CPU: the 8-bit optimizers need CUDA"
    state = f"{size_in_words(8 * inputs.adapter_parameters)} of {size_in_words(inputs.hardware.memory_bytes)}"
    reasons = {
        "paged_adamw_8bit": f"moments in 8 bits, paged to the host when memory is short: in 32 they take {state}",
        "adamw": f"one fused kernel, moments in 32 bits: they take {state}",
    }
    return value, reasons[value]


def _activations(inputs: PlanInputs, rule: Rule) -> tuple[str, str]:
    if not rule.rank:
        return "recompute", "activations of every weight's gradient would not fit"
    plan = plan_execution(inputs)
    memory = memory_of(plan, inputs)
    why = in_words(plan, inputs.shape.layers)
    speed = f"{speed_in_words(plan.tokens_per_s)} predicted; " if inputs.on_cuda else ""
    there = size_in_words(inputs.hardware.memory_bytes)
    room = f"{size_in_words(memory.peak_bytes)} ± {memory.uncertainty:.0%} of {there}"
    return str(plan.policy), f"{why}: {speed}{room}" + (
        "" if memory.fits(inputs.hardware) else ", and nothing needs less"
    )


def speed_in_words(tokens_per_s: float) -> str:
    """A speed as people say it."""
    if tokens_per_s >= 1000:
        return f"{tokens_per_s / 1000:,.1f} k tok/s"
    return f"{tokens_per_s:.3g} tok/s"


def in_words(plan: ExecutionPlan, layers: int) -> str:
    """What a person should know of the plan's policy."""
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
        parts.append(
            f"the 4-bit weights of {policy.dequantized_layers} of {layers} layers lie unpacked in what is left"
        )
    if plan.graph_bytes:
        parts.append(f"micro-batches of up to {policy.cuda_graph_max_tokens:,} tokens run as CUDA graphs")
    if policy.micro_tokens:
        parts.append(f"micro-batches have up to {policy.micro_tokens:,} tokens")
    return ", ".join(parts)


def _on_the_host(policy: MemoryPolicy, size_bytes: int) -> str:
    kept = (
        f"what {policy.offloaded_layers} layers keep"
        if policy.offloaded_layers > 1
        else "what one layer keeps"
        if policy.offloaded_layers
        else ""
    )
    waiting = [*([kept] if kept else []), *(["the input embeddings"] if policy.host_embeddings else [])]
    many = policy.host_embeddings
    return f"{' and '.join(waiting)} {'wait' if many else 'waits'} in {size_in_words(size_bytes)} of the host's memory"
