"""Memory: the bytes and seconds of a memory policy, and the solver for the fastest. No torch."""

from lorafit.memory.execution_plan import estimate_memory
from lorafit.memory.inputs import DataStats, PlanInputs

__all__ = ["DataStats", "PlanInputs", "estimate_memory"]
