"""The registry of objectives."""

from __future__ import annotations

from collections.abc import Callable

from lorafit.config import RunConfig
from lorafit.engine import VocabularyLoss
from lorafit.objectives.objective import Objective
from lorafit.objectives.sft import Sft

OBJECTIVES: dict[str, Callable[[VocabularyLoss], Objective]] = {"sft": Sft}
"""What makes each objective of a model's vocabulary loss, by the name that the setting `objective` has."""


def objective_of(config: RunConfig, loss: VocabularyLoss) -> Objective:
    """Return the objective that `config` chooses, over the proved `loss` of the run's model."""
    return OBJECTIVES[config.objective](loss)
