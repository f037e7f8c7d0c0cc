"""full: every weight of the text model trained, saved, loaded and exported."""

from lorafit.methods.full.optimizer import MasterWeights, stochastically_rounded, with_stochastic_rounding
from lorafit.methods.full.weights_folder import WeightsSnapshot

__all__ = [
    "MasterWeights",
    "WeightsSnapshot",
    "stochastically_rounded",
    "with_stochastic_rounding",
]
