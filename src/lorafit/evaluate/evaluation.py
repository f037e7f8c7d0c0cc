"""evaluation: the metrics of one model on rows, and two models compared on the same rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorafit.evaluate.answers import Question, Reply
from lorafit.evaluate.scores import (
    EXACT_MATCH,
    JSON_EQUAL,
    JSON_FIELDS,
    JSON_VALID,
    TOKEN_F1,
    as_json,
    exact_match,
    json_scores,
    token_f1,
)
from lorafit.evaluate.statistics import Difference, Estimate, bootstrap, paired, share

LOSS = "loss"
"""Mean negative log-likelihood of the supervised tokens, in nats a token; lower is better."""
SHARES = frozenset({EXACT_MATCH, JSON_VALID, JSON_EQUAL})
"""Metrics whose scores are 0 or 1."""

KNOWN = (LOSS, EXACT_MATCH, TOKEN_F1, JSON_VALID, JSON_EQUAL, JSON_FIELDS)
"""Every metric of this module, in the order of display."""

Metric = Callable[[str, str], float]
"""A metric of the caller's: (expected text, answer) -> score. Higher is better."""


@dataclass(frozen=True)
class ScoredRow:
    """Hold one row with its reply and its scores.

    Attributes:
        question: the row.
        reply: the model's reply.
        scores: metric -> score of this row; the loss is in nats a token.
    """

    question: Question
    reply: Reply
    scores: Mapping[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready mapping."""
        return {"answer": self.reply.answer, "cut": self.reply.cut, "scores": dict(self.scores)}


@dataclass(frozen=True)
class ModelScores:
    """Hold the metrics of one model.

    Attributes:
        name: the model's name.
        rows: every row with its scores.
        metrics: metric -> its mean and interval, in the order of display.
    """

    name: str
    rows: tuple[ScoredRow, ...]
    metrics: Mapping[str, Estimate]

    @classmethod
    def of(
        cls, name: str, questions: Sequence[Question], found: Sequence[Reply], metrics: Mapping[str, Metric]
    ) -> ModelScores:
        """Score the replies of one model; `metrics` are the caller's own beside the usual ones."""
        wanted = [as_json(question.expected) if question.prompt else None for question in questions]
        asked = [place for place, question in enumerate(questions) if question.prompt]
        is_json = bool(asked) and all(wanted[place] is not None for place in asked)
        rows = [
            ScoredRow(question, reply, _scores(question, reply, value if is_json else None, metrics))
            for question, reply, value in zip(questions, found, wanted, strict=True)
        ]
        names = dict.fromkeys(metric for row in rows for metric in row.scores)
        return cls(name, tuple(rows), {metric: _estimate(metric, rows) for metric in names})


@dataclass(frozen=True)
class Evaluation:
    """Hold one model's metrics, and another's on the same rows.

    Attributes:
        rows_from: where the rows come from.
        tuned: the evaluated model.
        other: the model that it is compared with; None without one.
        max_new_tokens: most tokens of an answer.
        differences: metric -> the evaluated model's difference from the other's.
    """

    rows_from: str
    tuned: ModelScores
    other: ModelScores | None
    max_new_tokens: int
    differences: Mapping[str, Difference]

    @classmethod
    def of(cls, rows_from: str, tuned: ModelScores, other: ModelScores | None, max_new_tokens: int) -> Evaluation:
        """Compare both models, metric by metric. Losses are compared only if both read the same tokens."""
        shared = [name for name in tuned.metrics if other and name in other.metrics]
        names = [name for name in shared if other and (name != LOSS or _read_alike(tuned, other))]
        differences = {name: _difference(name, other, tuned) for name in names if other}
        return cls(rows_from, tuned, other, max_new_tokens, differences)

    @property
    def asked(self) -> int:
        """Return the number of rows that were answered; the others give a loss alone."""
        return sum(row.reply.answer is not None for row in self.tuned.rows)

    @property
    def cut(self) -> int:
        """Return the number of the evaluated model's answers that were cut at their most tokens."""
        return sum(row.reply.cut for row in self.tuned.rows)

    @property
    def tokens(self) -> int:
        """Return the supervised tokens of all rows."""
        return sum(row.reply.tokens for row in self.tuned.rows)

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready mapping, without the rows."""
        models = {scores.name: scores for scores in (self.other, self.tuned) if scores}
        return {
            "rows_from": self.rows_from,
            "rows": len(self.tuned.rows),
            "answered": self.asked,
            "tokens": self.tokens,
            "max_new_tokens": self.max_new_tokens,
            "cut": self.cut,
            "model": self.tuned.name,
            "metrics": {
                name: {metric: estimate.to_dict() for metric, estimate in scores.metrics.items()}
                for name, scores in models.items()
            },
            "differences": {
                name: {**one.estimate.to_dict(), "verdict": one.verdict} for name, one in self.differences.items()
            },
        }

    def rows_to_dicts(self) -> list[dict[str, Any]]:
        """Return a JSON-ready mapping for each row: question, response, and what each model answered."""
        others = self.other.rows if self.other else (None,) * len(self.tuned.rows)
        rows = []
        for ours, theirs in zip(self.tuned.rows, others, strict=True):
            question = ours.question
            row: dict[str, Any] = {"source": question.record.source, "messages": question.record.messages()}
            row |= {"expected": question.expected, self.tuned.name: ours.to_dict()}
            rows.append(row | ({self.other.name: theirs.to_dict()} if self.other and theirs else {}))
        return rows


def _scores(question: Question, reply: Reply, wanted: Any, metrics: Mapping[str, Metric]) -> dict[str, float]:
    scores = {LOSS: reply.nll / reply.tokens} if reply.tokens else {}
    if reply.answer is None:
        return scores
    scores[EXACT_MATCH] = exact_match(question.expected, reply.answer)
    scores[TOKEN_F1] = token_f1(question.expected, reply.answer)
    if wanted is not None:
        scores |= json_scores(wanted, reply.answer)
    return scores | {name: float(metric(question.expected, reply.answer)) for name, metric in metrics.items()}


def _estimate(metric: str, rows: Sequence[ScoredRow]) -> Estimate:
    values, weights = _column(metric, rows)
    return share(values) if metric in SHARES else bootstrap(values, weights)


def _difference(metric: str, first: ModelScores, second: ModelScores) -> Difference:
    before, weights = _column(metric, first.rows)
    after, _ = _column(metric, second.rows)
    if any(math.isinf(value) or math.isnan(value) for value in [*before, *after]):
        return Difference(Estimate(math.nan, math.nan, math.nan), metric != LOSS)
    return paired(before, after, weights, higher_is_better=metric != LOSS)


def _read_alike(first: ModelScores, second: ModelScores) -> bool:
    pairs = zip(first.rows, second.rows, strict=True)
    return all(list(ours.question.ids) == list(theirs.question.ids) for ours, theirs in pairs)


def _column(metric: str, rows: Sequence[ScoredRow]) -> tuple[list[float], list[float] | None]:
    """Return (scores, weights) of the rows that have the metric; the loss is weighted by tokens."""
    having = [row for row in rows if metric in row.scores]
    weights = [float(row.reply.tokens) for row in having] if metric == LOSS else None
    return [row.scores[metric] for row in having], weights
