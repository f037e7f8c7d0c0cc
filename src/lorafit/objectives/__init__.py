"""objectives: the losses that a run minimizes."""

from lorafit.objectives.objective import Objective
from lorafit.objectives.sft import Sft

__all__ = ["Objective", "Sft"]
