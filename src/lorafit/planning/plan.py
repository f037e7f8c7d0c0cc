"""Plan: the decisions, forecast and findings of a run, and the recipe that reproduces it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import yaml

from lorafit.config import Resolved, RunConfig
from lorafit.config.run_config import METHOD_DEFAULTS
from lorafit.findings import Finding, chosen, has_errors
from lorafit.hardware import Hardware
from lorafit.memory.execution_plan import MemoryEstimate
from lorafit.memory.inputs import DataStats, PlanInputs
from lorafit.planning.decisions import Decided, Decision, Option, decide, price_options
from lorafit.planning.forecast import REASON, Forecast, forecast, too_large_for_one
from lorafit.planning.pitfalls import obstacles, pitfalls
from lorafit.shapes import ModelShape, experts_note, targets_note

WIDTH = 1 << 20
"""Columns after which YAML folds a line, so large that each setting stays one line."""

DOCUMENT_END = "...\n"
"""Marker that PyYAML writes after a bare scalar."""


def plan_recipe(plan: Plan, config: RunConfig) -> str:
    """Return a recipe for `lorafit train`.

    It has every setting that differs from its default, and every planned one with its reason. For a plan that lorafit
    cannot run, the recipe only describes the run.
    """
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
        "compute": "bf16",
        "optimizer": "adamw",
        "memory_policy": "recompute",
        "lr": METHOD_DEFAULTS["full"]["lr"],
        "schedule": config.schedule,
        "warmup": config.warmup,
        "epochs": config.epochs,
        "examples_per_step": config.examples_per_step,
        "max_length": config.max_length,
        "seed": config.seed,
    }
    head = f"# full fine-tuning of {plan.shape.name or 'a base'}: for a machine with {plan.gpus} GPUs of this kind"
    return "\n".join([head, *(_line(key, value) for key, value in settings.items())]) + "\n"


def _line(key: str, value: Any) -> str:
    plain = list(value) if isinstance(value, tuple) else value
    text = yaml.safe_dump(plain, default_flow_style=True, width=WIDTH, allow_unicode=True)
    return f"{key}: {text.removesuffix(DOCUMENT_END).strip()}"


@dataclass(frozen=True)
class Plan:
    """Hold the plan of a run. Ranges are (low, high).

    Attributes:
        inputs: Inputs of the plan, with every decision in the settings.
        decided: Every planned setting.
        targets: Names of the modules with an adapter; none in full fine-tuning.
        run: Memory, time and cost of the run.
        options: Memory, time and cost of each row of the decision matrix.
        findings: Obstacles and pitfalls of the run.
    """

    inputs: PlanInputs
    decided: Decided
    targets: tuple[str, ...]
    run: Forecast
    options: tuple[Option, ...]
    findings: tuple[Finding, ...]

    @property
    def shape(self) -> ModelShape:
        """Sizes of the model."""
        return self.inputs.shape

    @property
    def stats(self) -> DataStats:
        """Data stats of the training rows."""
        return self.inputs.stats

    @property
    def method(self) -> str:
        """Method: QLoRA, LoRA, or full fine-tuning."""
        return self.decided.method

    @property
    def decisions(self) -> tuple[Decision, ...]:
        """Every planned setting with its reason and source."""
        return self.decided.decisions

    @property
    def hardware(self) -> Hardware:
        """Device of the plan; the run takes `gpus` of them."""
        return self.run.hardware

    @property
    def gpus(self) -> int:
        """Number of devices that the run takes."""
        return self.run.gpus

    @property
    def memory(self) -> MemoryEstimate:
        """Peak memory of each device."""
        return self.run.memory

    @property
    def time_s(self) -> tuple[float, float]:
        """Seconds of the whole run."""
        return self.run.duration.time_s

    @property
    def time_assumes(self) -> tuple[str, ...]:
        """Assumptions behind times and price."""
        return self.run.duration.assumes

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return self.run.duration.steps

    @property
    def cost_usd(self) -> tuple[float, float]:
        """Price of the run at the assumed range of prices."""
        return self.run.cost_usd

    @property
    def runnable(self) -> bool:
        """False, with a `reason`, when full fine-tuning takes more GPUs than the settings name."""
        return not self.decided.is_full or self.gpus == self.inputs.gpus

    @property
    def reason(self) -> str:
        """Reason that the plan cannot run; empty when it can."""
        return "" if self.runnable else REASON

    @property
    def notes(self) -> tuple[str, ...]:
        """Assumptions about model and device, and the modules that a preset adapts beyond its usual ones."""
        shape = self.shape
        rows = self._rows_note()
        asked = self.inputs.config.targets
        targets = None if self.decided.is_full else targets_note(asked, shape.projections, shape.family)
        rank, visited = self.inputs.config.rank, shape.experts_per_token
        experts = "" if self.decided.is_full else experts_note(self.targets, shape.projections, rank, visited)
        several = self.time_assumes[-1] if self.inputs.gpus > 1 else ""
        return (*shape.notes, *filter(None, [rows, targets, experts, several]), *self.hardware.notes)

    def _rows_note(self) -> str:
        """Return a note on rows that are not packed; empty for packed ones."""
        shape, share = self.shape, self.inputs.stats.padded_share
        if shape.alone:
            return f"rows train one a forward, which is slower than packing: {shape.alone}"
        if shape.is_padded:
            return f"rows train in right-padded batches, {1 - share:.0%} of them padding, not packed: {shape.unpacked}"
        return ""

    @property
    def trainable_parameters(self) -> int:
        """Trained weights."""
        return self.inputs.trained_parameters

    @property
    def fits(self) -> bool:
        """True when the expected peak is within the hardware's memory."""
        return self.memory.fits(self.hardware)

    @property
    def blocked(self) -> bool:
        """True when an error finding stops the run before it starts."""
        return has_errors(self.findings) or not self.runnable

    def settings(self) -> dict[str, Any]:
        """Return the planned settings, for `Resolved.planned`."""
        return {decision.key: decision.value for decision in self.decisions}

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready mapping, the content of plan.json."""
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
    """Return the plan of a run: its decisions, memory, time, cost and findings.

    Raises AdapterError when the model lacks the targets.
    """
    given = PlanInputs(resolved.config, stats, shape, hardware)
    decided = decide(resolved, given)
    targets = () if decided.is_full else given.targets
    inputs = given.with_settings(**{decision.key: decision.value for decision in decided.decisions})
    # findings and the other rows of the matrix depend on the user's memory policy, not on the planned one
    judged = inputs.with_settings(memory_policy=resolved.config.memory_policy)
    run = forecast(inputs, full=decided.is_full)
    beyond = decided.is_full and run.gpus != inputs.gpus
    return Plan(
        inputs=inputs,
        decided=decided,
        targets=targets,
        run=run,
        options=price_options(judged, decided.rule),
        findings=tuple([too_large_for_one(inputs, run.gpus)] if beyond else _findings(judged, run.memory)),
    )


def _findings(inputs: PlanInputs, memory: MemoryEstimate) -> list[Finding]:
    reported = chosen(pitfalls(inputs, memory), inputs.config.select, inputs.config.ignore)
    return [*obstacles(inputs, memory), *reported]  # obstacles are always reported
