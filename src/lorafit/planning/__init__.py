"""Planning: the method, memory, time, cost and pitfalls of a run. No torch.

They follow from the data, the model and the hardware.
"""

from lorafit.planning.decisions import Decision
from lorafit.planning.gpu_choice import choose_gpus, most_gpus
from lorafit.planning.pitfalls import pitfalls
from lorafit.planning.plan import Plan, make_plan, plan_recipe

__all__ = ["Decision", "Plan", "choose_gpus", "make_plan", "most_gpus", "pitfalls", "plan_recipe"]
