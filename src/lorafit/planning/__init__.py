"""Planning: the method, rank, memory, time, cost and pitfalls of a run, from its data, model and hardware. No torch."""

from lorafit.planning.decisions import Decision, Option
from lorafit.planning.pitfalls import pitfalls
from lorafit.planning.plan import Plan, make_plan, plan_recipe

__all__ = ["Decision", "Option", "Plan", "make_plan", "pitfalls", "plan_recipe"]
