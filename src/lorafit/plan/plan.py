"""make_plan: from the data's size, the model's shape and the hardware to every setting of the run, with reasons."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lorafit.config import Resolved, RunConfig
from lorafit.findings import Finding, chosen, has_errors
from lorafit.plan.decisions import Decision, decide
from lorafit.plan.facts import DataFacts
from lorafit.plan.fit import obstacles
from lorafit.plan.forecast import forecast
from lorafit.plan.full import REASON, not_built
from lorafit.plan.hardware import Hardware
from lorafit.plan.memory import MemoryEstimate, adapter_parameters
from lorafit.plan.options import Option, price_options
from lorafit.plan.pitfalls import pitfalls
from lorafit.plan.shape import ModelShape
from lorafit.plan.targets import resolve_targets


@dataclass(frozen=True)
class Plan:
    """What a run will do, why, and what it will take. Ranges are (low, high).

    `runnable` is False, with `reason`, when the matrix asks for a method that lorafit cannot run.
    """

    method: str
    decisions: tuple[Decision, ...]
    targets: tuple[str, ...]
    memory: MemoryEstimate
    time_s: tuple[float, float]
    time_assumes: tuple[str, ...]
    steps: int
    cost_usd: tuple[float, float]
    options: tuple[Option, ...]
    findings: tuple[Finding, ...]
    shape: ModelShape
    hardware: Hardware
    gpus: int
    facts: DataFacts
    trainable_parameters: int
    runnable: bool = True
    reason: str = ""

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
        shape = self.shape
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
            "model": {
                "name": shape.name,
                "family": shape.family,
                "layers": shape.layers,
                "hidden": shape.hidden,
                "parameters": shape.parameters,
                "trainable_parameters": self.trainable_parameters,
                "exact": shape.exact,
                "notes": list(shape.notes),
            },
            "hardware": self.hardware.to_dict() | {"gpus": self.gpus},
            "data": {
                "rows": self.facts.rows,
                "tokens": self.facts.tokens,
                "supervised_tokens": self.facts.supervised_tokens,
                "longest": self.facts.longest,
                "mean_tokens": round(self.facts.mean_tokens, 2),
                "holdout_rows": self.facts.holdout_rows,
            },
        }


def make_plan(resolved: Resolved, facts: DataFacts, shape: ModelShape, hardware: Hardware) -> Plan:
    """Decide every planned setting that nobody set, estimate memory, time and cost, and judge the result.

    Raises AdapterError when the targets are not in the model.
    """
    targets = resolve_targets(resolved.config.targets, shape)
    decided = decide(resolved, facts, shape, hardware)
    config = final_config(resolved.config, decided.decisions)
    full = decided.is_full
    run = forecast(shape, config, hardware, facts, full=full)
    return Plan(
        method=decided.method,
        decisions=decided.decisions,
        targets=targets,
        memory=run.memory,
        time_s=run.duration.time_s,
        time_assumes=run.duration.assumes,
        steps=run.duration.steps,
        cost_usd=run.cost_usd,
        options=price_options(config, facts, shape, hardware, decided.rule),
        findings=tuple([not_built()] if full else _findings(config, shape, hardware, run.memory, facts, targets)),
        shape=shape,
        hardware=run.hardware,
        gpus=run.gpus,
        facts=facts,
        trainable_parameters=shape.parameters if full else adapter_parameters(shape, targets, config.rank),
        runnable=not full,
        reason=REASON if full else "",
    )


def final_config(config: RunConfig, decisions: tuple[Decision, ...]) -> RunConfig:
    """`config` with every decision in it."""
    return config.model_copy(update={decision.key: decision.value for decision in decisions})


def _findings(
    config: RunConfig,
    shape: ModelShape,
    hardware: Hardware,
    memory: MemoryEstimate,
    facts: DataFacts,
    targets: tuple[str, ...],
) -> list[Finding]:
    judged = pitfalls(config, shape, hardware, memory, facts, targets)
    # what cannot finish is never left out
    return [*obstacles(config, shape, hardware, memory, facts), *chosen(judged, config.select, config.ignore)]
