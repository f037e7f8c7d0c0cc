"""Objectives are chosen by name, and made of the model's vocabulary loss."""

from lorafit.config import RunConfig
from lorafit.engine import VocabularyLoss
from lorafit.objectives import OBJECTIVES, Sft, objective_of


def test_the_settings_default_is_the_built_in_objective():
    assert {RunConfig().objective} == set(OBJECTIVES)


def test_the_settings_choose_the_objective_and_it_gets_the_models_loss(monkeypatch):
    loss = VocabularyLoss(None)
    made = objective_of(RunConfig(), loss)
    assert isinstance(made, Sft) and made.name == "sft" and made.vocabulary_loss is loss
    monkeypatch.setitem(OBJECTIVES, "other", lambda loss: ("other", loss))
    chosen = RunConfig.model_construct(objective="other")
    assert objective_of(chosen, loss) == ("other", loss)
