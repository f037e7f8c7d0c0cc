"""Logit rules: a table of the changes that families make to logits after their head.

Each row is a field of config.json. The table follows the modelling files of transformers 5.23. The start-up proof
(`vocabulary_loss_for`) finds a family that is missing or differs, and its logits are then computed whole, by its own
code.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any


class Effect(Enum):
    """The effect of a field's value on the logits."""

    MULTIPLY = "multiply"
    DIVIDE = "divide"
    CAP = "cap"


@dataclass(frozen=True, slots=True)
class Rule:
    """Hold the effect of one field of config.json on the logits.

    Attributes:
        field: Name of the field.
        effect: Its effect.
        families: Model types with this effect.
    """

    field: str
    effect: Effect
    families: frozenset[str]


RULES = (
    Rule(
        "final_logit_softcapping",
        Effect.CAP,
        frozenset(
            "gemma2 gemma3_text gemma3n gemma3n_text gemma4 gemma4_text gemma4_unified gemma4_unified_text "
            "nanochat paligemma vaultgemma muse_glimmer muse_spark".split()
        ),
    ),
    Rule("logits_soft_cap", Effect.CAP, frozenset(["recurrent_gemma"])),
    Rule("logit_scale", Effect.MULTIPLY, frozenset("cohere cohere2 cohere2_moe cohere_compass".split())),
    Rule(
        "logits_scaling",
        Effect.DIVIDE,
        frozenset(
            "granite granite_swa granitemoe granitemoe_swa granitemoehybrid granitemoeshared granite4_vision "
            "granite_docling".split()
        ),
    ),
    Rule("logits_scaling", Effect.MULTIPLY, frozenset("hyperclovax hyperclovax_vision_v2".split())),
    Rule("lm_head_multiplier", Effect.MULTIPLY, frozenset(["falcon_h1"])),
    Rule("output_multiplier", Effect.MULTIPLY, frozenset("muse_glimmer muse_spark".split())),
)

# in a family that RULES does not list, a field of one of these names may change the logits
SUSPECT = frozenset(rule.field for rule in RULES) | {"unpadded_vocab_size", "final_logits_bias"}


@dataclass(frozen=True, slots=True)
class LogitSteps:
    """Hold the steps after the head.

    logits = cap · tanh(scale · z / cap), or scale · z without a cap, where z is the head's output.
    """

    scale: float = 1.0
    cap: float | None = None


def logit_steps(config: Any) -> LogitSteps | None:
    """Return the family's steps after its head; None if they are unknown.

    `config` is a transformers configuration.
    """
    text = config.get_text_config()
    scale, cap = 1.0, None
    for field in sorted(SUSPECT):
        value = getattr(text, field, None)
        if value is None:
            continue
        effect = _effect(field, config.model_type)
        if effect is None or not isinstance(value, (int, float)) or not value > 0:
            return None
        if effect is Effect.CAP:
            cap = float(value)
        else:
            scale *= value if effect is Effect.MULTIPLY else 1.0 / value
    return LogitSteps(scale, cap)


def _effect(field: str, family: str) -> Effect | None:
    return next((rule.effect for rule in RULES if rule.field == field and family in rule.families), None)


# embeddings whose forward is `super().forward(ids) * scale`, by class name in transformers
SCALED_EMBEDDINGS = frozenset(
    f"{family}ScaledWordEmbedding"
    for family in (
        "GemmaText Gemma2Text Gemma3Text Gemma3nText Gemma4Text Gemma4UnifiedText VaultGemmaText MiniCPM3 BioGpt XGLM"
    ).split()
)
