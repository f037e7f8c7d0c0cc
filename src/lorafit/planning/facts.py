"""DataFacts: what the plan needs to know about the data, and nothing more."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DataFacts:
    """The size of the training data after tokenising.

    `rows` are the training rows, without the `holdout_rows` kept for evaluation. `tokens` counts every token of
    the training rows, `supervised_tokens` those in the loss, `longest` the tokens of the longest row and
    `mean_tokens` the mean row.
    """

    rows: int
    tokens: int
    supervised_tokens: int
    longest: int
    mean_tokens: float
    holdout_rows: int = 0
