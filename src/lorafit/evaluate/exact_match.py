"""exact_match: compare the model's greedy answers with the responses, character by character."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lorafit.data import Rows, Template
from lorafit.engine import generate
from lorafit.evaluate import scores
from lorafit.evaluate.answers import SPARE_TOKENS


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


def exact_match(model: Any, rows: Rows, template: Template, *, limit: int | None = None) -> ExactMatch:
    """Compare greedy answers to the prompts of `rows` with their responses.

    `limit` keeps only the first rows. The template builds each prompt as in serving, instead of cutting it from the
    training ids.
    """
    chosen = range(min(len(rows), limit or len(rows)))
    records = [rows.record(index) for index in chosen]
    longest = max((int(rows.supervised[index]) for index in chosen), default=0)
    prompts = [template.prompt_ids(record.prompt) for record in records]
    answers = generate(model, prompts, template.stop_ids, max_new_tokens=longest + SPARE_TOKENS)
    samples = tuple(
        Sample(_last_user_text(record.prompt), record.response, template.tokenizer.decode(answer), record.source)
        for record, answer in zip(records, answers, strict=True)
    )
    return ExactMatch(sum(sample.matches for sample in samples) / max(len(samples), 1), samples)


def _last_user_text(messages: Sequence[dict[str, Any]]) -> str:
    return next((str(message["content"]) for message in reversed(messages) if message["role"] == "user"), "")
