"""Row mode: packed rows where they are proved isolated, padded batches of rows elsewhere, and single rows at worst."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from lorafit.backbone import failed_forward, unwrapped
from lorafit.engine.attention.packed import packed
from lorafit.engine.isolation import LeakError, require_causal, require_finite_logits, require_isolated, uneven
from lorafit.engine.loss.vocabulary import Row, VocabularyLoss, vocabulary_loss_for
from lorafit.errors import BackboneError, TrainingError
from lorafit.shapes import length_limit

FAMILY_ERRORS = (TypeError, ValueError, AttributeError, KeyError, IndexError, NotImplementedError, RuntimeError)
"""Errors of a family's own forward that was not written for packed rows."""
ALONE_TOKENS = 1
"""Limit of a micro-batch at which every row has one of its own."""


@dataclass(frozen=True, slots=True)
class RowMode:
    """Hold the mode in which the rows of a micro-batch run through one model.

    Attributes:
        reason: Why rows are not packed; empty when packed rows are proved isolated.
        alone: Why a forward takes one row, beside `reason`; empty when rows are proved to share a micro-batch.
    """

    reason: str = ""
    alone: str = ""

    @property
    def is_packed(self) -> bool:
        """True when rows lie one after another, with packed attention."""
        return not self.reason

    @property
    def is_padded(self) -> bool:
        """True when rows lie side by side, padded on the right, with the family's own attention."""
        return bool(self.reason) and not self.alone

    @property
    def is_alone(self) -> bool:
        """True when a forward takes one row, with the family's own attention."""
        return bool(self.alone)

    @property
    def in_words(self) -> str:
        """The mode in one line, for the user."""
        if self.is_packed:
            return "packed rows verified isolated from each other"
        if self.is_padded:
            return f"right-padded rows verified isolated from each other; not packed: {self.reason}"
        return f"one row a forward: {'; '.join(dict.fromkeys((self.reason, self.alone)))}"

    def attending(self, model: Any) -> AbstractContextManager[None]:
        """Use the attention of this mode in `model` inside the block."""
        return packed(model) if self.is_packed else nullcontext()

    def micro_tokens(self, most_tokens: int) -> int:
        """Return the limit of a micro-batch, `most_tokens` unless every row runs alone."""
        return ALONE_TOKENS if self.is_alone else most_tokens


PACKED = RowMode()


def prove_rows(model: Any, rows: Sequence[Row], longest: int = 0) -> tuple[RowMode, VocabularyLoss]:
    """Return the fastest mode whose rows cannot see each other on `model`, and the loss that is proved for it.

    Rows are packed if the isolation test passes, and if the run's `longest` row, in tokens, is below every length at
    which the model computes otherwise; `rows` may be too short to show that. Other rows share right-padded batches if
    the same test passes for those. Raises TrainingError if the logits are not finite, or if tokens see later ones.
    """
    changes = _change_by_length(model, longest)
    mode = RowMode(changes or _obstacle(model, rows), changes)
    if mode.is_packed:
        with mode.attending(model):
            return mode, vocabulary_loss_for(model, rows)
    require_finite_logits(model, rows)
    require_causal(model, rows[-1])
    if not mode.is_alone:
        mode = RowMode(mode.reason, _obstacle(model, uneven(rows), padded=True))
    return mode, vocabulary_loss_for(model, rows[:1] if mode.is_alone else rows, padded=True)


def require_runs(model: Any, row: Row) -> None:
    """Raise TrainingError unless the forward of `model` takes one row of text as it is, and gives finite logits."""
    try:
        require_finite_logits(model, [row])
    except torch.OutOfMemoryError:
        raise
    except FAMILY_ERRORS as error:
        where = type(unwrapped(model)).__name__
        raise TrainingError(failed_forward(error), where=where, fix="choose another base") from error


def _change_by_length(model: Any, longest: int) -> str:
    limit = length_limit(unwrapped(model).config.get_text_config().to_dict())
    return limit.reason(longest) if limit else ""


def _obstacle(model: Any, rows: Sequence[Row], *, padded: bool = False) -> str:
    """Return the reason that rows of `model` cannot share a micro-batch, packed or `padded`; empty if they can."""
    try:
        with nullcontext() if padded else packed(model):
            require_isolated(model, rows, padded=padded)
    except LeakError as error:
        return error.seen
    except BackboneError as error:
        return error.what
    except torch.OutOfMemoryError:
        raise
    except FAMILY_ERRORS as error:
        return f"this family's forward does not take {'padded' if padded else 'packed'} rows ({type(error).__name__})"
    return ""
