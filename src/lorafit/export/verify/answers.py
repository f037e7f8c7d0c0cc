"""Answers: the greedy answers of an export, compared with the live model's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from lorafit.data import Record, Template
from lorafit.engine import generate
from lorafit.export.formats import OpenedModel, Row

SPARE_TOKENS = 8
"""Most tokens of an answer beyond the longest response."""
SIGNIFICANT = 0.05


@dataclass(frozen=True)
class LiveAnswers:
    """Hold the live model's greedy answers.

    Attributes:
        prompts: token ids of each prompt.
        expected: the rows' responses as text.
        answers: token ids of each answer, the stop token included where one ended it.
        template: the run's template.
        max_new_tokens: most tokens of an answer.
    """

    prompts: tuple[list[int], ...]
    expected: tuple[str, ...]
    answers: tuple[list[int], ...]
    template: Template
    max_new_tokens: int

    @classmethod
    def of(cls, live_model: nn.Module, records: Sequence[Record], template: Template) -> LiveAnswers:
        """Let `live_model` answer the last turn of each of `records`."""
        expected = tuple(record.response.strip() for record in records)
        longest = max((len(template.tokenizer.encode(text)) for text in expected), default=0)
        prompts = tuple(template.prompt_ids(record.prompt) for record in records)
        limit = longest + SPARE_TOKENS
        made = generate(live_model, prompts, template.stop_ids, max_new_tokens=limit)
        # an answer shorter than the limit was ended by the template's stop token
        ended = tuple([*ids, template.stop_ids[0]] if len(ids) < limit else ids for ids in made)
        return cls(prompts, expected, ended, template, limit)

    def compare(self, served: OpenedModel) -> Answers:
        """Return how many answers of `served` equal the live model's, and how many of both equal the responses.

        One forward pass over prompt and live answer decides equality: greedy decoding repeats an answer if each of its
        tokens is the most likely one after those before it. Only a different answer is decoded token by token, from
        the first token that differs and as long as it may become the response.
        """
        judged = []
        for prompt, expected, answer in zip(self.prompts, self.expected, self.answers, strict=True):
            found = most_likely(served, prompt, answer)
            same = self._ended_alike(found) == self._ended_alike(answer)
            live = self._text(answer) == expected
            judged.append((same, live, live if same else self._becomes(expected, served, prompt, answer, found)))
        return Answers.of(judged)

    def compare_texts(self, texts: Sequence[str]) -> Answers:
        """Return the same counts for answers that came as `texts`, one for each prompt."""
        lives, ours = [self._text(answer) for answer in self.answers], [text.strip() for text in texts]
        each = zip(self.expected, lives, ours, strict=True)
        return Answers.of([(text == live, live == expected, text == expected) for expected, live, text in each])

    def _ended_alike(self, ids: list[int]) -> list[int]:
        """Return `ids` with the first stop token in place of any other that ends them."""
        stops = self.template.stop_ids
        return [*ids[:-1], stops[0]] if ids and ids[-1] in stops else ids

    def _becomes(
        self, expected: str, served: OpenedModel, prompt: Sequence[int], answer: Sequence[int], found: Sequence[int]
    ) -> bool:
        """Return True if the answer of `served` is `expected`; `found` are its tokens after those of `answer`."""
        differs = next(place for place, (ours, theirs) in enumerate(zip(found, answer)) if ours != theirs)
        ids = list(found[: differs + 1])
        while ids[-1] not in self.template.stop_ids and len(ids) < self.max_new_tokens:
            if not _begins(self._text(ids), expected):
                return False
            ids.append(most_likely(served, [*prompt, *ids], [0])[0])
        return self._text(ids) == expected

    def _text(self, ids: Sequence[int]) -> str:
        kept = ids[:-1] if ids and ids[-1] in self.template.stop_ids else ids
        return self.template.tokenizer.decode(kept).strip()


@dataclass(frozen=True)
class Answers:
    """Hold counts of greedy answers.

    Attributes:
        rows: prompts of held-out rows.
        equal: answers equal to the live model's, token by token.
        live_right: live answers that equal the row's response.
        right: answers that equal the row's response.
        worse: True if fewer are right than chance explains (sign test, 5 %).
    """

    rows: int
    equal: int
    live_right: int
    right: int
    worse: bool

    @classmethod
    def of(cls, judged: Sequence[tuple[bool, bool, bool]]) -> Answers:
        """Count (equal to the live answer, live answer right, answer right), one for each row."""
        lost = sum(live and not ours for _, live, ours in judged)
        won = sum(ours and not live for _, live, ours in judged)
        equal, live_right, right = (sum(each[place] for each in judged) for place in range(3))
        return cls(len(judged), equal, live_right, right, worse(lost, won))

    @property
    def sentence(self) -> str:
        """Return the counts as text."""
        right = f"{self.right} right where the live model has {self.live_right}"
        chance = ", fewer than chance explains" if self.worse else ""
        return f"{self.equal} of {self.rows} greedy answers equal, {right}{chance}"


def _begins(text: str, expected: str) -> bool:
    """Return False if no further token makes `expected` of `text`.

    Further tokens change the text before them in two ways only: they complete a character, shown as U+FFFD until then,
    and they take away spaces before punctuation.
    """
    return "".join(expected.split()).startswith("".join(text.rstrip("\ufffd").split()))


def most_likely(served: OpenedModel, prompt: Sequence[int], answer: Sequence[int]) -> list[int]:
    """Return the most likely token at each place of `answer` after `prompt`."""
    ids = np.array([*prompt, *answer], dtype=np.int32)
    mask = np.arange(len(ids)) >= len(prompt)
    found: Any = served.log_probabilities(Row(ids, mask)).argmax(-1).tolist()
    return [int(each) for each in found]


def worse(lost: int, won: int) -> bool:
    """Return True if a fair coin loses `lost` or more of the changed answers in under 5 % of cases (sign test)."""
    changed = lost + won
    tail = sum(math.comb(changed, count) for count in range(lost, changed + 1)) / 2**changed
    return tail < SIGNIFICANT
