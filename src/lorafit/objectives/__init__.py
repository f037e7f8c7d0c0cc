"""objectives: the losses that a run minimizes."""

from lorafit.objectives.objective import Objective
from lorafit.objectives.registry import OBJECTIVES, objective_of
from lorafit.objectives.sft import Sft

__all__ = ["OBJECTIVES", "Objective", "Sft", "objective_of"]
