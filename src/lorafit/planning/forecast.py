"""Forecast: what a run with settled settings takes: device, memory, time, money."""

from __future__ import annotations

from dataclasses import dataclass

from lorafit.config import RunConfig
from lorafit.planning.duration import Duration, estimate_duration
from lorafit.planning.execution_plan import plan_execution
from lorafit.planning.facts import DataFacts
from lorafit.planning.full import full_card, full_duration, full_memory, gpus_needed
from lorafit.planning.hardware import Hardware
from lorafit.planning.memory import MemoryEstimate, memory_of
from lorafit.planning.shape import ModelShape


@dataclass(frozen=True, slots=True)
class Forecast:
    """The memory on each of `gpus` devices like `hardware`, and the duration of the whole run."""

    hardware: Hardware
    gpus: int
    memory: MemoryEstimate
    duration: Duration

    @property
    def cost_usd(self) -> tuple[float, float]:
        """The run's price (low, high)."""
        return self.duration.cost_usd(self.hardware, self.gpus)


def forecast(
    shape: ModelShape, config: RunConfig, hardware: Hardware, facts: DataFacts, *, full: bool = False
) -> Forecast:
    """The forecast of training adapters as `config` says, or with `full` of training every weight."""
    if full:
        card = full_card(hardware)
        return Forecast(
            card,
            gpus_needed(shape, card),
            full_memory(shape, config, card, facts),
            full_duration(shape, config, card, facts),
        )
    plan = plan_execution(shape, config, hardware, facts)
    memory = memory_of(plan, shape, config, hardware)
    return Forecast(hardware, 1, memory, estimate_duration(shape, config, hardware, facts, plan))
