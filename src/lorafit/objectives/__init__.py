"""objectives: the losses that a run minimizes."""

from lorafit.objectives.objective import Objective
from lorafit.objectives.registry import OBJECTIVES, maker_of, objective_of
from lorafit.objectives.sft import Sft

__all__ = ["OBJECTIVES", "Objective", "Sft", "maker_of", "objective_of"]
