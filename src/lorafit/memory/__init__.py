"""Memory: the bytes and seconds of a memory policy, and the solver for the fastest. No torch."""

from lorafit.memory.execution_plan import MemoryEstimate, estimate_memory
from lorafit.memory.footprint import Component
from lorafit.memory.inputs import DataStats, PlanInputs

__all__ = ["Component", "DataStats", "MemoryEstimate", "PlanInputs", "estimate_memory"]
