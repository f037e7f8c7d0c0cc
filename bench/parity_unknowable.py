"""Orders whose responses have a wording that nobody can know, as real answers could as well have been put otherwise."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random

import numpy as np

from lorafit.api.train import TrainedRun
from lorafit.data import TextTokenizer
from lorafit.demo import TASKS, Task
from lorafit.demo.tasks import Row
from lorafit.demo.text import FIELD_WORDS
from lorafit.evaluate import Sample
from lorafit.export import Row as MaskedRow
from lorafit.export import TransformersModel
from lorafit.export.verify.comparison import Reference

FIELDS = tuple(json.loads(TASKS["orders"].draw(Random(0))["response"]))
FIELD_OF = {word: field for field, words in FIELD_WORDS.items() for word in words}
ENTROPY = math.log(math.factorial(len(FIELDS)) * math.prod(len(FIELD_WORDS[field]) for field in FIELDS))
"""Of the wording of one row, in nats: no model's loss over many rows is below it."""
NAME = re.compile(r'"([^"]*)": ')


def _drawn(random: Random) -> Row:
    row = TASKS["orders"].draw(random)
    fields = list(json.loads(row["response"]).items())
    random.shuffle(fields)
    return row | {"response": json.dumps({random.choice(FIELD_WORDS[name]): value for name, value in fields})}


TASK = Task("orders-worded", _drawn)
"""The base has seen these names and does not know which is asked for; unlike a random code it need not learn them."""


def in_one_wording(text: str) -> str:
    """The JSON `text` with its fields in order under the names of `FIELDS`; what has not just these stays as it is."""
    try:
        pairs = json.loads(text, object_pairs_hook=tuple)
    except ValueError:
        return text
    if not isinstance(pairs, tuple) or sorted(FIELD_OF.get(word, "") for word, _ in pairs) != sorted(FIELDS):
        return text
    values = {FIELD_OF[word]: value for word, value in pairs}
    return json.dumps({field: values[field] for field in FIELDS})


def matches_but_for_wording(sample: Sample) -> bool:
    """Whether the answer says of each field what the response says, under whichever of its names."""
    answer, expected = in_one_wording(sample.answer), in_one_wording(sample.expected)
    return replace(sample, answer=answer, expected=expected).matches


def knowable_share(samples: Sequence[Sample]) -> float:
    """The share of `samples` answered exactly but for the wording."""
    return sum(map(matches_but_for_wording, samples)) / len(samples)


@dataclass(frozen=True)
class Parts:
    """Held-out losses of two parts of the responses: nats a token but for the fields' names, nats a row of these."""

    knowable: float
    wording: float

    @classmethod
    def of(cls, run: TrainedRun, rows: Sequence[MaskedRow]) -> Parts:
        """Of `run`'s model as it computes now."""
        model = TransformersModel(run.model)
        split = [split_mask(run.template.tokenizer, *row) for row in rows]
        knowable, wording = (
            Reference.of(model, [MaskedRow(row.ids, parts[which]) for row, parts in zip(rows, split, strict=True)])
            for which in (0, 1)
        )
        return cls(knowable.loss, wording.loss * wording.positions / len(rows))

    def columns(self, other: Parts) -> str:
        """What these parts and those of `other` add to a line of the table."""
        losses = f"{self.knowable:.5f} | {other.knowable:.5f} | {other.knowable / self.knowable - 1:+.2%}"
        return f" {losses} | {self.wording:.3f} | {other.wording:.3f} |"


PARTS_HEAD = (
    f" knowable part alone, bf16 | fp8 | difference | nats a row of the wording, bf16 (entropy {ENTROPY:.3f}) | fp8 |",
    "---|---|---|---|---|",
)


def split_mask(tokenizer: TextTokenizer, ids: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`mask` without the tokens that hold a part of a field's name, and those tokens."""
    supervised = np.flatnonzero(mask)
    ends = [len(tokenizer.decode(ids[supervised[:many]].tolist())) for many in range(len(supervised) + 1)]
    spans = [found.span(1) for found in NAME.finditer(tokenizer.decode(ids[supervised].tolist()))]
    named = [any(ends[at + 1] > start and ends[at] < end for start, end in spans) for at in range(len(supervised))]
    wording = np.zeros_like(mask)
    wording[supervised[named]] = True
    return mask & ~wording, wording
