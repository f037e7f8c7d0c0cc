"""Plan: data size + model shape + hardware → method, rank, memory, time, cost, and the pitfalls. No torch."""

from lorafit.hardware.detect import detect_hardware, hardware_for, hardware_here
from lorafit.hardware.device import Hardware, hardware_named
from lorafit.memory.estimate import MemoryEstimate, estimate_memory
from lorafit.memory.inputs import DataStats
from lorafit.memory.static_memory import Component
from lorafit.planning.decisions import Decision
from lorafit.planning.matrix import Option
from lorafit.planning.pitfalls import pitfalls
from lorafit.planning.plan import Plan, make_plan
from lorafit.planning.recipe import plan_recipe
from lorafit.shapes.shape import ModelShape, Projection, resolve_targets

__all__ = [
    "Component",
    "DataStats",
    "Decision",
    "Hardware",
    "MemoryEstimate",
    "ModelShape",
    "Option",
    "Plan",
    "Projection",
    "detect_hardware",
    "estimate_memory",
    "hardware_for",
    "hardware_here",
    "hardware_named",
    "make_plan",
    "pitfalls",
    "plan_recipe",
    "resolve_targets",
]
