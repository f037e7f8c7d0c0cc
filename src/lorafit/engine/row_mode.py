"""Row mode: packed rows where they are proved isolated, and one row a forward everywhere else."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from lorafit.backbone import one_line, unwrapped
from lorafit.engine.attention.packed import packed
from lorafit.engine.isolation import LeakError, Row, assert_causal, assert_finite, assert_isolated
from lorafit.engine.loss.vocabulary import VocabularyLoss, vocabulary_loss_for
from lorafit.errors import BackboneError, TrainingError
from lorafit.shapes import length_limit

FAMILY_ERRORS = (TypeError, ValueError, AttributeError, KeyError, IndexError, NotImplementedError, RuntimeError)
"""Errors of a family's own forward that was not written for packed rows."""
ALONE_TOKENS = 1
"""Limit of a micro-batch at which every row has one of its own."""


@dataclass(frozen=True, slots=True)
class RowMode:
    """Hold how the rows of a micro-batch run through one model.

    Attributes:
        reason: Why a forward takes one row; empty when packed rows are proved isolated.
    """

    reason: str = ""

    @property
    def is_alone(self) -> bool:
        """True when a forward takes one row, with the family's own attention."""
        return bool(self.reason)

    @property
    def in_words(self) -> str:
        """The mode in one line, for the user."""
        return f"one row a forward: {self.reason}" if self.reason else "packed rows verified isolated from each other"

    def attending(self, model: Any) -> AbstractContextManager[None]:
        """Use the attention of this mode in `model` inside the block."""
        return nullcontext() if self.is_alone else packed(model)

    def micro_tokens(self, packed_tokens: int) -> int:
        """Return the limit of a micro-batch, `packed_tokens` if rows are packed."""
        return ALONE_TOKENS if self.is_alone else packed_tokens


PACKED = RowMode()


def prove_rows(model: Any, rows: Sequence[Row], longest: int = 0) -> tuple[RowMode, VocabularyLoss]:
    """Return the fastest mode whose rows cannot see each other on `model`, and the loss that is proved for it.

    Rows are packed if the isolation test passes, and if the run's `longest` row, in tokens, is below every length at
    which the model computes otherwise; `rows` may be too short to show that. Raises TrainingError if the logits are not
    finite, or if tokens see later ones.
    """
    mode = RowMode(_change_by_length(model, longest) or _obstacle(model, rows))
    with mode.attending(model):
        if mode.is_alone:
            assert_finite(model, rows)
            assert_causal(model, rows[-1])
        return mode, vocabulary_loss_for(model, rows[:1] if mode.is_alone else rows, alone=mode.is_alone)


def require_runs(model: Any, row: Row) -> None:
    """Raise TrainingError unless the forward of `model` takes one row of text as it is, and gives finite logits."""
    try:
        assert_finite(model, [row])
    except torch.OutOfMemoryError:
        raise
    except FAMILY_ERRORS as error:
        what = f"the base's forward fails on a row of text ({type(error).__name__}: {one_line(error)})"
        raise TrainingError(what, where=type(unwrapped(model)).__name__, fix="choose another base") from error


def _change_by_length(model: Any, longest: int) -> str:
    limit = length_limit(unwrapped(model).config.get_text_config().to_dict())
    return limit.reason(longest) if limit else ""


def _obstacle(model: Any, rows: Sequence[Row]) -> str:
    """Return why the rows of `model` cannot be packed; empty if they can."""
    try:
        with packed(model):
            assert_isolated(model, rows)
    except LeakError as error:
        return error.seen
    except BackboneError as error:
        return error.what
    except torch.OutOfMemoryError:
        raise
    except FAMILY_ERRORS as error:
        return f"this family's forward does not take packed rows ({type(error).__name__})"
    return ""
