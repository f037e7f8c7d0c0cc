"""The registry of objectives, and those of installed packages."""

from __future__ import annotations

from collections.abc import Callable

from lorafit.config import RunConfig
from lorafit.engine import VocabularyLoss
from lorafit.objectives.objective import Objective
from lorafit.objectives.sft import Sft
from lorafit.plugins import OBJECTIVES as GROUP
from lorafit.plugins import load_plugin

OBJECTIVES: dict[str, Callable[[VocabularyLoss], Objective]] = {"sft": Sft}
"""What makes each built-in objective of a model's vocabulary loss, by its value of the setting `objective`."""


def objective_of(config: RunConfig, loss: VocabularyLoss) -> Objective:
    """Return the objective that `config` chooses, over the proved `loss` of the run's model."""
    return maker_of(config.objective)(loss)


def maker_of(name: str) -> Callable[[VocabularyLoss], Objective]:
    """Return the factory of the objective `name`. Raises UsageError for a plug-in that cannot be used."""
    plugin: Callable[[VocabularyLoss], Objective]
    plugin = OBJECTIVES[name] if name in OBJECTIVES else load_plugin(GROUP, name, Objective)
    return plugin
