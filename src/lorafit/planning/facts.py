"""DataFacts: what the plan needs to know about the data, and nothing more."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DataFacts:
    """The size of the training data after tokenising.

    `rows` are the training rows, without the `holdout_rows` kept for evaluation. `tokens` counts every token of
    the training rows, `supervised_tokens` those in the loss, `longest` the tokens of the longest row and
    `mean_tokens` the mean row. `largest_step`: tokens of the run's largest step; 0 where nobody counted them, and a
    step of the longest rows is reckoned with.
    """

    rows: int
    tokens: int
    supervised_tokens: int
    longest: int
    mean_tokens: float
    holdout_rows: int = 0
    largest_step: int = 0
