"""exact_match: compare the model's greedy answers with the responses, character by character."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lorafit.data import Rows, Template
from lorafit.engine import generate
from lorafit.evaluate import scores
from lorafit.evaluate.answers import longest_answer, questions_of


@dataclass(frozen=True, slots=True)
class Sample:
    """Hold one held-out row and the model's answer.

    Attributes:
        prompt: the last user turn.
        expected: the row's response.
        answer: the model's answer.
        source: the row's `file:line`.
    """

    prompt: str
    expected: str
    answer: str
    source: str

    @property
    def matches(self) -> bool:
        return scores.exact_match(self.expected, self.answer) == 1


@dataclass(frozen=True, slots=True)
class ExactMatch:
    """Hold the result of exact match.

    Attributes:
        share: the share of matching samples, 0 to 1.
        samples: every sample.
    """

    share: float
    samples: tuple[Sample, ...]


def exact_match(model: Any, rows: Rows, template: Template) -> ExactMatch:
    """Compare greedy answers to the prompts of `rows` with their responses."""
    questions = questions_of(rows, template)
    prompts = [question.prompt for question in questions]
    answers = generate(model, prompts, template.stop_ids, max_new_tokens=longest_answer(questions))
    samples = tuple(
        Sample(question.asked, question.expected, template.tokenizer.decode(answer), question.record.source)
        for question, answer in zip(questions, answers, strict=True)
    )
    return ExactMatch(sum(sample.matches for sample in samples) / max(len(samples), 1), samples)
