"""Plan: data size + model shape + hardware → method, rank, memory, time, cost, and the pitfalls. No torch."""

from lorafit.plan.decisions import Decision
from lorafit.plan.detect import detect_hardware, hardware_for
from lorafit.plan.facts import DataFacts
from lorafit.plan.hardware import Hardware, hardware_named
from lorafit.plan.memory import Component, MemoryEstimate, estimate_memory
from lorafit.plan.options import Option
from lorafit.plan.pitfalls import pitfalls
from lorafit.plan.plan import Plan, make_plan
from lorafit.plan.recipe import plan_recipe
from lorafit.plan.shape import ModelShape, Projection
from lorafit.plan.targets import resolve_targets

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
    "hardware_named",
    "make_plan",
    "pitfalls",
    "plan_recipe",
    "resolve_targets",
]
