"""Plan: data size + model shape + hardware → method, rank, memory, time, cost, and the pitfalls. No torch."""

from lorafit.planning.decisions import Decision
from lorafit.planning.detect import detect_hardware, hardware_for, hardware_here
from lorafit.planning.facts import DataFacts
from lorafit.planning.hardware import Hardware, hardware_named
from lorafit.planning.memory import MemoryEstimate, estimate_memory
from lorafit.planning.options import Option
from lorafit.planning.pitfalls import pitfalls
from lorafit.planning.plan import Plan, make_plan
from lorafit.planning.recipe import plan_recipe
from lorafit.planning.shape import ModelShape, Projection
from lorafit.planning.standing import Component
from lorafit.planning.targets import resolve_targets

__all__ = [
    "Component",
    "DataFacts",
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
