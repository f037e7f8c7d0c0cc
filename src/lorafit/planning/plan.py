"""plan_recipe: the YAML recipe that reproduces a plan."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import yaml

from lorafit.config import Resolved, RunConfig
from lorafit.findings import Finding, chosen, has_errors
from lorafit.hardware import Hardware
from lorafit.memory.execution_plan import MemoryEstimate
from lorafit.memory.inputs import DataStats, PlanInputs
from lorafit.planning.decisions import Decided, Decision, Option, decide, price_options
from lorafit.planning.forecast import LEARNING_RATE, REASON, Forecast, forecast, not_built
from lorafit.planning.pitfalls import obstacles, pitfalls
from lorafit.shapes import ModelShape

WIDTH = 1 << 20
"""Columns before YAML would fold a line: a setting is one line."""

DOCUMENT_END = "...\n"
"""What PyYAML writes after a bare scalar."""


def plan_recipe(plan: Plan, config: RunConfig) -> str:
    """A recipe for `lorafit train`: every setting that differs from its default, and every planned one with its
    reason. Of a plan that lorafit cannot run, a recipe that says what the run would be."""
    if not plan.runnable:
        return _full_recipe(plan, config)
    decided = {decision.key: decision for decision in plan.decisions}
    lines = [f"# {plan.method} of {plan.shape.name or 'a base'} on {plan.hardware.name}"]
    for key, field in RunConfig.model_fields.items():
        if key in decided:
            lines.append(f"{_line(key, decided[key].value)}  # {decided[key].source}: {decided[key].reason}")
        elif (value := getattr(config, key)) != field.get_default(call_default_factory=True):
            lines.append(_line(key, value))
    return "\n".join(lines) + "\n"


def _full_recipe(plan: Plan, config: RunConfig) -> str:
    settings = {
        "base": config.base,
        "data": list(config.data),
        "method": "full",
        "gpus": plan.gpus,
        "sharding": "weights, gradients and optimizer over all GPUs (FSDP or ZeRO-3)",
        "compute": "bf16",
        "optimizer": "adamw",
        "memory_policy": "recompute",
        "lr": LEARNING_RATE,
        "schedule": config.schedule,
        "warmup": config.warmup,
        "epochs": config.epochs,
        "examples_per_step": config.examples_per_step,
        "max_length": config.max_length,
        "seed": config.seed,
    }
    head = f"# full fine-tuning of {plan.shape.name or 'a base'}: lorafit cannot run this recipe yet"
    return "\n".join([head, *(_line(key, value) for key, value in settings.items())]) + "\n"


def _line(key: str, value: Any) -> str:
    plain = list(value) if isinstance(value, tuple) else value
    text = yaml.safe_dump(plain, default_flow_style=True, width=WIDTH, allow_unicode=True)
    return f"{key}: {text.removesuffix(DOCUMENT_END).strip()}"


@dataclass(frozen=True)
class Plan:
    """Hold what a run will do, what it will take, and what is wrong with it. Ranges are (low, high).

    Attributes:
        inputs: What the plan was made for, with every decision in its settings.
        decided: Every planned setting.
        targets: Names of the modules that get an adapter.
        run: Memory, time and cost of the run.
        options: The same for each row of the decision matrix.
        findings: What is wrong with it.
    """

    inputs: PlanInputs
    decided: Decided
    targets: tuple[str, ...]
    run: Forecast
    options: tuple[Option, ...]
    findings: tuple[Finding, ...]

    @property
    def shape(self) -> ModelShape:
        """The model."""
        return self.inputs.shape

    @property
    def stats(self) -> DataStats:
        """The size of the data."""
        return self.inputs.stats

    @property
    def method(self) -> str:
        """QLoRA, LoRA, or full fine-tuning."""
        return self.decided.method

    @property
    def decisions(self) -> tuple[Decision, ...]:
        """Every planned setting with its reason and who decided it."""
        return self.decided.decisions

    @property
    def hardware(self) -> Hardware:
        """The device planned for; `gpus` of them."""
        return self.run.hardware

    @property
    def gpus(self) -> int:
        """Devices that the run takes."""
        return self.run.gpus

    @property
    def memory(self) -> MemoryEstimate:
        """The peak on each device."""
        return self.run.memory

    @property
    def time_s(self) -> tuple[float, float]:
        """Seconds of the whole run."""
        return self.run.duration.time_s

    @property
    def time_assumes(self) -> tuple[str, ...]:
        """What the times and the price assume."""
        return self.run.duration.assumes

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return self.run.duration.steps

    @property
    def cost_usd(self) -> tuple[float, float]:
        """The run's price at the assumed range of prices."""
        return self.run.cost_usd

    @property
    def runnable(self) -> bool:
        """False, with a `reason`, when the matrix asks for a method that lorafit cannot run."""
        return not self.decided.is_full

    @property
    def reason(self) -> str:
        """Why the plan cannot run; empty when it can."""
        return "" if self.runnable else REASON

    @property
    def trainable_parameters(self) -> int:
        """Weights that train."""
        return self.inputs.adapter_parameters if self.runnable else self.shape.parameters

    @property
    def fits(self) -> bool:
        """True when the expected peak is within the hardware's memory."""
        return self.memory.fits(self.hardware)

    @property
    def blocked(self) -> bool:
        """True when a finding must stop the run before it starts."""
        return has_errors(self.findings) or not self.runnable

    def settings(self) -> dict[str, Any]:
        """The planned settings, for `Resolved.planned`."""
        return {decision.key: decision.value for decision in self.decisions}

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready mapping: what plan.json holds."""
        return {
            "method": self.method,
            "runnable": self.runnable,
            "reason": self.reason,
            "decisions": [decision.to_dict() for decision in self.decisions],
            "targets": list(self.targets),
            "memory": self.memory.to_dict(),
            "fits": self.fits,
            "time_s": [round(bound, 1) for bound in self.time_s],
            "time_assumes": list(self.time_assumes),
            "steps": self.steps,
            "cost_usd": [round(bound, 4) for bound in self.cost_usd],
            "options": [option.to_dict() for option in self.options],
            "findings": [finding.to_dict() for finding in self.findings],
            "model": self.shape.to_dict() | {"trainable_parameters": self.trainable_parameters},
            "hardware": self.hardware.to_dict() | {"gpus": self.gpus},
            "data": asdict(self.stats),
        }


def make_plan(resolved: Resolved, stats: DataStats, shape: ModelShape, hardware: Hardware) -> Plan:
    """Decide every planned setting that nobody set, estimate memory, time and cost, and judge the result.

    Raises AdapterError when the targets are not in the model.
    """
    asked = PlanInputs(resolved.config, stats, shape, hardware)
    targets = asked.targets
    decided = decide(resolved, asked)
    inputs = asked.with_settings(**{decision.key: decision.value for decision in decided.decisions})
    # findings and the other rows of the matrix go by the memory policy that was asked for
    judged = inputs.with_settings(memory_policy=resolved.config.memory_policy)
    run = forecast(inputs, full=decided.is_full)
    return Plan(
        inputs=inputs,
        decided=decided,
        targets=targets,
        run=run,
        options=price_options(judged, decided.rule),
        findings=tuple([not_built()] if decided.is_full else _findings(judged, run.memory)),
    )


def _findings(inputs: PlanInputs, memory: MemoryEstimate) -> list[Finding]:
    judged = chosen(pitfalls(inputs, memory), inputs.config.select, inputs.config.ignore)
    return [*obstacles(inputs, memory), *judged]  # what cannot finish is never left out
