"""Memory: what a memory policy costs in bytes and seconds, and the search for the fastest that fits. No torch."""

from lorafit.memory.execution_plan import MemoryEstimate, estimate_memory
from lorafit.memory.footprint import Component
from lorafit.memory.inputs import DataStats, PlanInputs

__all__ = ["Component", "DataStats", "MemoryEstimate", "PlanInputs", "estimate_memory"]
