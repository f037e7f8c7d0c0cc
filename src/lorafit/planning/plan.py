"""make_plan: from the data's size, the model's shape and the hardware to every setting of the run, with reasons."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from lorafit.config import Resolved, RunConfig
from lorafit.findings import Finding, chosen, has_errors
from lorafit.hardware.device import Hardware
from lorafit.memory.estimate import MemoryEstimate
from lorafit.memory.inputs import DataStats
from lorafit.memory.static_memory import adapter_parameters
from lorafit.planning.decisions import Decided, Decision, decide
from lorafit.planning.fit import obstacles
from lorafit.planning.forecast import REASON, Forecast, forecast, not_built
from lorafit.planning.matrix import Option, price_options
from lorafit.planning.pitfalls import pitfalls
from lorafit.shapes.shape import ModelShape, resolve_targets


@dataclass(frozen=True)
class Plan:
    """What a run will do (`decided`, `targets`), what it will take (`run`, and `options` beside it), and what is
    wrong with it (`findings`). Ranges are (low, high)."""

    decided: Decided
    targets: tuple[str, ...]
    run: Forecast
    options: tuple[Option, ...]
    findings: tuple[Finding, ...]
    shape: ModelShape
    facts: DataStats

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
        if not self.runnable:
            return self.shape.parameters
        return adapter_parameters(self.shape, self.targets, self.settings()["rank"])

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
            "data": asdict(self.facts),
        }


def make_plan(resolved: Resolved, facts: DataStats, shape: ModelShape, hardware: Hardware) -> Plan:
    """Decide every planned setting that nobody set, estimate memory, time and cost, and judge the result.

    Raises AdapterError when the targets are not in the model.
    """
    targets = resolve_targets(resolved.config.targets, shape)
    decided = decide(resolved, facts, shape, hardware)
    config = final_config(resolved.config, decided.decisions)
    # what is judged, and what other rows of the matrix would do, goes by the activations as they were asked for
    asked = config.model_copy(update={"activations": resolved.config.activations})
    full = decided.is_full
    run = forecast(shape, config, hardware, facts, full=full)
    return Plan(
        decided=decided,
        targets=targets,
        run=run,
        options=price_options(asked, facts, shape, hardware, decided.rule),
        findings=tuple([not_built()] if full else _findings(asked, shape, hardware, run.memory, facts, targets)),
        shape=shape,
        facts=facts,
    )


def final_config(config: RunConfig, decisions: tuple[Decision, ...]) -> RunConfig:
    """`config` with every decision in it."""
    return config.model_copy(update={decision.key: decision.value for decision in decisions})


def _findings(
    config: RunConfig,
    shape: ModelShape,
    hardware: Hardware,
    memory: MemoryEstimate,
    facts: DataStats,
    targets: tuple[str, ...],
) -> list[Finding]:
    judged = pitfalls(config, shape, hardware, memory, facts, targets)
    # what cannot finish is never left out
    return [*obstacles(config, shape, hardware, memory, facts), *chosen(judged, config.select, config.ignore)]
