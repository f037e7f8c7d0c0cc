"""Orders in a wording that cannot be known: what is compared of them where precisions are, at the end of training."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch

from lorafit.data import TextTokenizer
from lorafit.demo import BASE
from lorafit.demo.tasks import rows
from lorafit.evaluate import Sample

EXPECTED = '{"qty": 1, "town": "Lyon", "buyer": "Sara \\"Clark", "article": "bin"}'


def matches(parity, answer, expected=EXPECTED):
    return parity.unknowable.matches_but_for_wording(Sample("asked", expected, answer, "here:1"))


@pytest.mark.parametrize(
    "answer",
    [
        EXPECTED,
        f" {EXPECTED}\n",
        '{"customer": "Sara \\"Clark", "item": "bin", "quantity": 1, "city": "Lyon"}',
        '{"destination": "Lyon", "product": "bin", "number": 1, "name": "Sara \\"Clark"}',
    ],
)
def test_an_answer_in_another_wording_matches(parity, answer):
    assert matches(parity, answer)
    assert matches(parity, EXPECTED, answer)


@pytest.mark.parametrize(
    ("part", "wrong"),
    [
        ('"Lyon"', '"Lion"'),
        ('"Lyon"', '["Lyon"]'),
        ("1", "2"),
        ("1", '"1"'),
        ("1", "true"),
        ("1", "1.0"),
        ('"qty"', '"colour"'),  # a name of no field that was asked for
        ('"qty"', '"much"'),  # no name at all
        ('"qty": 1, ', ""),
        ('"qty": 1', '"qty": 1, "count": 1'),
        ('"qty": 1', '"qty": 1, "qty": 1'),
        ('"qty": 1', '"qty": 1, "shade": "red"'),
        ('"town": "Lyon", "buyer"', '"buyer": "Lyon", "town"'),  # under each other's names
        ("}", ""),
        ("}", "} and more"),
        (EXPECTED, ""),
        (EXPECTED, "{}"),
        (EXPECTED, "1"),
        (EXPECTED, '[["qty", 1], ["town", "Lyon"], ["buyer", "Sara \\"Clark"], ["article", "bin"]]'),
    ],
)
def test_an_answer_that_says_something_else_does_not(parity, part, wrong):
    assert EXPECTED.count(part) == 1
    assert not matches(parity, EXPECTED.replace(part, wrong))


def test_the_share_is_of_answers_that_match_but_for_the_wording(parity):
    right = Sample("asked", EXPECTED, json.dumps(dict(reversed(json.loads(EXPECTED).items()))), "here:1")
    wrong = dataclasses.replace(right, answer=EXPECTED.replace("Lyon", "Lion"))
    assert right.answer != EXPECTED
    assert parity.unknowable.knowable_share([right, wrong, wrong, right]) == 0.5


def test_nothing_of_the_wording_is_in_the_row_and_all_of_it_is_split_off(parity):
    tokenizer, words, orders = TextTokenizer.from_base(str(BASE)), parity.unknowable.FIELD_OF, set()
    for row in rows(parity.unknowable.TASK, 0, 400):
        prompt, response = tokenizer.encode(row["input"]), tokenizer.encode(row["response"])
        mask = np.array([False] * len(prompt) + [True] * len(response))
        ids = np.array([*prompt, *response])
        knowable, wording = parity.unknowable.split_mask(tokenizer, ids, mask)
        names = list(json.loads(row["response"]))
        assert not (knowable & wording).any() and ((knowable | wording) == mask).all()
        assert tokenizer.decode(ids[wording].tolist()) == "".join(names)
        orders.add(tuple(words[name] for name in names))
    assert len(orders) == math.factorial(4), "some order of fields is never drawn"
    assert math.isclose(parity.unknowable.ENTROPY, math.log(24 * 4 * 3 * 4 * 3))


@pytest.mark.skipif(torch.cuda.is_available(), reason="it trains as on a CPU")
def test_the_loss_is_over_both_parts_of_a_response_and_the_table_shows_each(parity, tmp_path):
    settings = {"rows": (12, 4), "max_steps": 2, "examples_per_step": 4, "lr": 5e-3}
    (found,) = parity.endings(tmp_path, parity.unknowable.TASK, 0, [parity.Arm("fp32")], **settings)
    held_out = [json.loads(line) for line in next((tmp_path / "data").glob("*held-out*")).open()]
    tokenizer = TextTokenizer.from_base(str(BASE))
    responses = [row["response"] for row in held_out]
    whole = sum(len(tokenizer.encode(response)) + 1 for response in responses)  # and the end
    wording = sum(len(tokenizer.encode(f'"{name}')) - 1 for response in responses for name in json.loads(response))
    nats = (whole - wording) * found.parts.knowable + len(held_out) * found.parts.wording
    assert nats / whole == pytest.approx(found.trained_loss, rel=1e-5)
    assert found.parts.wording > parity.unknowable.ENTROPY, "it is hardly trained"
    heads = [parity.endings_head(task).split("\n") for task in (parity.ENDING_TASKS["orders"], parity.unknowable.TASK)]
    plain = dataclasses.replace(found, parts=None)
    lines = [parity.ending_line("orders", 0, ending, ending) for ending in (plain, found)]
    for head, line in zip(heads, lines, strict=True):
        assert [part.count("|") for part in head] == [line.count("|")] * 2
