"""answers: a model's answers to rows, and the likelihood of their responses."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from lorafit.data import Record, Rows, Template
from lorafit.engine import generate, logits_at

SPARE_TOKENS = 8
"""Tokens by which an answer may exceed the longest response."""


@dataclass(frozen=True, slots=True)
class Question:
    """Hold one row to answer.

    Attributes:
        record: the row.
        ids: token ids (tokens,), as in training.
        supervised: positions of the supervised tokens.
        prompt: token ids of the conversation before the last answer; empty if the row ends in no answer to learn.
        expected: the last answer as text.
        answer_tokens: tokens of the last answer, the stop token included.
    """

    record: Record
    ids: Sequence[int]
    supervised: Sequence[int]
    prompt: Sequence[int]
    expected: str
    answer_tokens: int

    @classmethod
    def of(cls, record: Record, ids: Sequence[int], mask: Sequence[bool], template: Template) -> Question:
        """Return the question of a row, with its prompt as serving renders it.

        A row that sets variables of the template keeps the prompt that it was tokenized with.
        """
        supervised = [place for place, taught in enumerate(mask) if taught and place]
        last = _last_segment(supervised)
        if record.is_document or not record.turns[-1].taught or not last:
            return cls(record, ids, supervised, (), "", 0)
        stops = set(template.stop_ids)
        answer = [ids[place] for place in last if ids[place] not in stops]
        plain = not record.turns[-1].extra
        expected = record.response if plain else template.tokenizer.decode(answer)
        prompt = ids[: last[0]] if record.template_kwargs else template.prompt_ids(record.prompt, record.tools)
        return cls(record, ids, supervised, prompt, expected, len(last))

    @property
    def asked(self) -> str:
        """Return the last user turn as text."""
        turns = self.record.turns
        return next((turn.content for turn in reversed(turns) if turn.role == "user"), turns[0].content)


def questions_of(rows: Rows, template: Template) -> list[Question]:
    """Return the question of each of `rows`, which were made with their records."""
    return [
        Question.of(rows.record(place), rows.ids(place).tolist(), rows.mask(place).tolist(), template)
        for place in range(len(rows))
    ]


@dataclass(frozen=True, slots=True)
class Reply:
    """Hold a model's answer to one question, and its loss on the response.

    Attributes:
        answer: the greedy answer as text; None if the question asks for none.
        nll: negative log-likelihood of the supervised tokens, in nats, summed.
        tokens: supervised tokens.
        cut: True if the answer was cut at its most tokens.
    """

    answer: str | None
    nll: float
    tokens: int
    cut: bool


def longest_answer(questions: Sequence[Question]) -> int:
    """Return the most tokens that an answer needs: those of the longest response, and a few more."""
    return max((question.answer_tokens for question in questions), default=0) + SPARE_TOKENS


def replies(
    model: Any,
    questions: Sequence[Question],
    template: Template,
    stop_ids: Sequence[int],
    *,
    max_new_tokens: int,
    on_answer: Callable[[int], None] | None = None,
) -> list[Reply]:
    """Let `model` answer `questions` greedily, and measure the likelihood of their responses.

    `on_answer` receives the number of questions that are answered.
    """
    asked = [question.prompt for question in questions if question.prompt]
    most = max(map(len, asked), default=0)
    limit = max(1, min(max_new_tokens, _positions_of(model) - most))
    answers = iter(generate(model, asked, stop_ids, max_new_tokens=limit, on_batch=on_answer))
    found = []
    for question in questions:
        ids = next(answers) if question.prompt else None
        text = None if ids is None else template.tokenizer.decode(ids)
        nll = negative_log_likelihood(model, question.ids, question.supervised)
        found.append(Reply(text, nll, len(question.supervised), ids is not None and len(ids) >= limit))
    return found


def negative_log_likelihood(model: Any, ids: Sequence[int], supervised: Sequence[int]) -> float:
    """Return the summed loss of the `supervised` positions of one row, in nats."""
    if not supervised:
        return 0.0
    logits = logits_at(model, ids, [place - 1 for place in supervised]).float()
    wanted = torch.tensor([ids[place] for place in supervised], device=logits.device)
    return float(F.cross_entropy(logits, wanted, reduction="sum"))


def _last_segment(supervised: Sequence[int]) -> list[int]:
    """Return the last run of neighbouring positions."""
    segment: list[int] = []
    for place in reversed(supervised):
        if segment and place != segment[-1] - 1:
            break
        segment.append(place)
    return segment[::-1]


def _positions_of(model: Any) -> int:
    return int(getattr(model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize)
