"""Memory: what a memory policy costs in bytes and seconds, and the search for the fastest that fits. No torch."""

from lorafit.memory.estimate import MemoryEstimate, estimate_memory
from lorafit.memory.inputs import DataStats, PlanInputs
from lorafit.memory.static_memory import Component

__all__ = ["Component", "DataStats", "MemoryEstimate", "PlanInputs", "estimate_memory"]
