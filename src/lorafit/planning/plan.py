"""make_plan: from the data's size, the model's shape and the hardware to every setting of the run, with reasons."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from lorafit.config import Resolved
from lorafit.findings import Finding, chosen, has_errors
from lorafit.hardware import Hardware
from lorafit.memory.estimate import MemoryEstimate
from lorafit.memory.inputs import DataStats, PlanInputs
from lorafit.planning.decisions import Decided, Decision, decide
from lorafit.planning.fit import obstacles
from lorafit.planning.forecast import REASON, Forecast, forecast, not_built
from lorafit.planning.matrix import Option, price_options
from lorafit.planning.pitfalls import pitfalls
from lorafit.shapes import ModelShape


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
