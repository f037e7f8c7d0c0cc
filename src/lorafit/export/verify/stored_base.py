"""stored_base: the live adapter over the base as stored, which is what a merge onto the original must be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lorafit.backbone import with_stored_weights
from lorafit.engine import padded_logits
from lorafit.export.formats import Row
from lorafit.export.verify.comparison import Comparison, Reference, median_row

ROWS, LONGEST = 8, 128
"""Rows that are measured, and their most tokens: the shortest ones, in one forward pass."""


def over_stored_weights(
    live: nn.Module, folder: Path, rows: Sequence[Row], rounded: Callable[[], AbstractContextManager[Any]]
) -> tuple[Reference, Comparison] | None:
    """Return the adapter over the weights in `folder` as a reference, and its noise floor.

    `live` has the adapter over the same base in NF4. `rounded` puts it into the precision of the floor. The cost is two
    more reads of the base, weight by weight. The floor is of the row with the median KL. None where a weight in 4 bits
    has no counterpart in `folder`.
    """
    chosen = _shortest(rows)
    with with_stored_weights(live, folder) as has_weights:
        if not has_weights or not chosen:
            return None
        exact = _log_probs(live, chosen)
        with rounded():
            again = _log_probs(live, chosen)
    reference = Reference.known(chosen, exact)
    return reference, median_row(reference, again)


def _shortest(rows: Sequence[Row]) -> list[Row]:
    cut = [Row(row.ids[:LONGEST], row.mask[:LONGEST]) for row in sorted(rows, key=lambda row: len(row.ids))[:ROWS]]
    return [row for row in cut if len(row.predicting)]


def _log_probs(model: Any, rows: Sequence[Row]) -> list[Tensor]:
    """Return the log-probabilities (positions, vocabulary) of every row, in fp32 on the CPU."""
    logits = padded_logits(model, [row.ids for row in rows])
    return [each[row.predicting].float().log_softmax(-1).cpu() for each, row in zip(logits, rows, strict=True)]
