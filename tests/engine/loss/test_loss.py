"""The loss of a packed micro-batch on real families: in chunks where that is right, whole where it is not."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM

from lorafit.backbone import load_backbone
from lorafit.config import resolve
from lorafit.engine import VocabularyLoss, collate, packed, summed_loss, supervised_logits, vocabulary_loss_for
from lorafit.engine.loss.logit_rules import RULES, LogitSteps, logit_steps
from lorafit.methods.lora import attach
from tiny_models import FAMILIES, SIZES, save_base, stir

WHOLE = VocabularyLoss(None)
STEPPED = {
    "gemma2": ({"final_logit_softcapping": 2.0}, LogitSteps(cap=2.0)),
    "gemma3_text": ({"final_logit_softcapping": 3.0}, LogitSteps(cap=3.0)),
    "cohere": ({"logit_scale": 0.25}, LogitSteps(scale=0.25)),
    "granite": ({"logits_scaling": 4.0}, LogitSteps(scale=0.25)),
    "qwen3": ({}, LogitSteps()),
}


def rows_of(*lengths, seed=0):
    random = np.random.default_rng(seed)
    return [(random.integers(4, 250, length).astype(np.int32), np.arange(length) >= length // 2) for length in lengths]


ROWS = rows_of(20, 33, 7, 40)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    made = {}

    def base(family):
        if family not in made:
            made[family] = save_base(tmp_path_factory.mktemp(family), family)
        return str(made[family])

    return base


def made(family, **overrides):
    """A random, frozen, adapted model whose logits spread widely, so that a missing step shows."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SIZES, **FAMILIES.get(family, {}), **overrides})
    model = AutoModelForCausalLM.from_config(config).requires_grad_(False)
    with torch.no_grad():
        model.get_output_embeddings().weight.normal_(std=0.5)
    adapted = attach(model, resolve(flags={"base": "made", "targets": "all-linear", "dropout": 0.0}).config)
    stir(adapted)
    return adapted


def loss_and_gradient(loss, model, batch):
    model.zero_grad()
    total = loss.summed(model, batch)
    total.backward()
    gradient = torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.requires_grad])
    return float(total.detach()), gradient


@pytest.mark.parametrize("family", STEPPED)
def test_a_familys_own_steps_are_known_proved_and_right(family):
    overrides, steps = STEPPED[family]
    model = made(family, **overrides)
    batch = collate(ROWS)
    with packed(model):
        chunked = vocabulary_loss_for(model, ROWS)
        assert chunked == VocabularyLoss(steps) == VocabularyLoss.expected(model)
        got, gradient = loss_and_gradient(chunked, model, batch)
        wanted, whole_gradient = loss_and_gradient(WHOLE, model, batch)
    assert abs(got / wanted - 1) < 1e-6
    assert float((gradient - whole_gradient).norm() / whole_gradient.norm()) < 1e-5


def test_the_loss_is_the_sum_over_supervised_positions():
    model = made("qwen3")
    with packed(model), torch.no_grad():
        batch = collate(ROWS)
        wanted = cross_entropy(supervised_logits(model, batch).double(), batch.targets, reduction="sum")
        assert abs(float(summed_loss(model, batch)) / float(wanted) - 1) < 1e-6


@pytest.mark.parametrize(
    "wrong", [LogitSteps(), LogitSteps(scale=0.9), LogitSteps(cap=2.2), LogitSteps(scale=0.98, cap=2.0)], ids=str
)
def test_a_table_that_is_wrong_is_found_and_logits_are_made_whole(wrong, monkeypatch):
    monkeypatch.setattr("lorafit.engine.loss.vocabulary.logit_steps", lambda config: wrong)
    model = made("gemma2", final_logit_softcapping=2.0)
    with packed(model):
        chosen = vocabulary_loss_for(model, ROWS)
        assert chosen.steps is None
        assert "Gemma2ForCausalLM" in chosen.reason and "in an unknown way" in chosen.reason
        assert "\n" not in chosen.reason
        assert loss_and_gradient(chosen, model, collate(ROWS))[0] == loss_and_gradient(WHOLE, model, collate(ROWS))[0]


def test_an_unknown_familys_suspect_field_makes_logits_whole_until_it_is_proved_idle():
    model = made("qwen3")
    model.config.logit_scale = 0.5  # Qwen 3 does not read it
    assert logit_steps(model.config) is None
    assert VocabularyLoss.expected(model).steps is None
    with packed(model):
        assert loss_and_gradient(VocabularyLoss.expected(model), model, collate(ROWS))[0] > 0
        assert vocabulary_loss_for(model, ROWS) == VocabularyLoss(LogitSteps())


class Biased(nn.Module):
    """A family with a step after the head that no config mentions."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.config = inner, inner.config

    def get_output_embeddings(self):
        return self.inner.get_output_embeddings()

    def forward(self, **inputs):
        output = self.inner(**inputs)
        output.logits = output.logits + torch.linspace(-2, 2, output.logits.shape[-1])
        return output


class Headless(Biased):
    """A family whose head is no module."""

    def get_output_embeddings(self):
        return None

    def forward(self, **inputs):
        return self.inner(**inputs)


class Aside(Headless):
    """A family that names a head it does not call."""

    def get_output_embeddings(self):
        return nn.Linear(64, 260)


@pytest.mark.parametrize("kind", [Biased, Headless, Aside])
def test_a_step_that_no_config_mentions_is_found(kind):
    inner = made("llama").get_base_model()
    model = kind(inner)
    with packed(inner):
        chosen = vocabulary_loss_for(model, ROWS)
        assert chosen.steps is None and chosen.reason
        batch = collate(ROWS)
        wanted = cross_entropy(supervised_logits(model, batch), batch.targets, reduction="sum")
        assert torch.allclose(chosen.summed(model, batch), wanted)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3"])
def test_a_base_in_bf16_is_proved_as_well(bases, family):
    flags = {"base": bases(family), "targets": "all-linear", "dropout": 0.0, "quantization": "none"}
    config = resolve(flags=flags).config
    model = attach(load_backbone(config).to(torch.bfloat16), config)
    with packed(model), torch.autocast("cpu", dtype=torch.bfloat16):
        chunked = vocabulary_loss_for(model, ROWS)
        assert chunked.steps is not None
        batch = collate(ROWS)
        got, wanted = (float(loss.summed(model, batch).detach()) for loss in (chunked, WHOLE))
    assert abs(got / wanted - 1) < 2e-3


class Autocast(Biased):
    """What accelerate makes of a model for mixed precision: autocast lasts as long as its forward."""

    def forward(self, **inputs):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.inner(**inputs)


def test_an_autocast_that_ends_with_the_models_forward_covers_the_loss_too():
    inner = made("llama").get_base_model()
    inner.get_output_embeddings().to(torch.bfloat16)  # hidden rows in fp32 cannot enter it without autocast
    model, batch = Autocast(inner), collate(ROWS)
    with packed(inner):
        chunked = vocabulary_loss_for(model, ROWS)
        assert chunked.steps is not None
        got, wanted = (float(loss.summed(model, batch).detach()) for loss in (chunked, WHOLE))
    assert abs(got / wanted - 1) < 1e-5


def test_the_head_is_left_as_it_was():
    model = made("llama")
    head = model.get_base_model().get_output_embeddings()
    model.train()
    with packed(model):
        vocabulary_loss_for(model, ROWS)
        summed_loss(model, collate(ROWS))
        assert model.training
        assert not head._forward_pre_hooks
        with pytest.raises(IndexError):
            summed_loss(model, collate([(np.array([4, 999]), np.array([False, True]))]))
    assert not head._forward_pre_hooks


def test_rows_without_a_supervised_token_have_no_loss_and_no_gradient():
    model = made("llama")
    with packed(model):
        total, gradient = loss_and_gradient(
            VocabularyLoss.expected(model), model, collate([(np.arange(4, 14), np.zeros(10))])
        )
    assert total == 0.0 and float(gradient.abs().sum()) == 0.0


def test_every_rule_names_a_model_type_that_transformers_has():
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    known = set(CONFIG_MAPPING.keys())
    assert RULES and all(rule.families & known for rule in RULES)
