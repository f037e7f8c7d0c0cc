"""The demo's rows and documents: seeded, and held-out rows held out."""

import json
from random import Random

import pytest

from lorafit.demo import BASE, TASKS, task_named, write_split
from lorafit.demo.tasks import rows
from lorafit.demo.text import document
from lorafit.errors import UsageError


@pytest.mark.parametrize("task", TASKS)
def test_the_split_is_seeded_and_shares_no_input(tmp_path, task):
    paths = [write_split(TASKS[task], tmp_path / str(i), 7, 300, 50) for i in range(2)]
    assert [path.read_bytes() for path in paths[0]] == [path.read_bytes() for path in paths[1]]
    train, held_out = ({json.loads(line)["input"] for line in path.open()} for path in paths[0])
    assert (len(train), len(held_out)) == (300, 50)
    assert not train & held_out


def test_seeds_change_the_training_rows_but_not_the_held_out_ones(tmp_path):
    one, two = (write_split(TASKS["dates"], tmp_path / str(seed), seed, 100, 20) for seed in (0, 1))
    assert one[0].read_bytes() != two[0].read_bytes()
    assert one[1].read_bytes() == two[1].read_bytes()


def test_answers_are_what_the_task_promises():
    for row in rows(TASKS["orders"], 0, 50):
        assert set(json.loads(row["response"])) == {"customer", "item", "quantity", "city"}
        assert json.loads(row["response"])["customer"] in row["input"]
    for row in rows(TASKS["dates"], 0, 50):
        year, month, day = map(int, row["response"].split("-"))
        assert str(year) in row["input"]
        assert str(day) in row["input"].replace("0", "") or str(day) in row["input"]
        assert 1 <= month <= 12


def test_no_pretraining_document_looks_like_an_instruction():
    random = Random(0)
    for _ in range(2000):
        text = document(random)
        assert "<|" not in text
        assert "Extract the order" not in text
        assert "Route this ticket" not in text


def test_the_bundled_base_is_small_and_says_how_it_was_made():
    assert sum(path.stat().st_size for path in BASE.iterdir()) <= 8 * 10**6
    assert json.loads((BASE / "made.json").read_text())["parameters"] == 3_475_712


def test_an_unknown_task_names_the_others():
    with pytest.raises(UsageError, match="orders, dates, tickets"):
        task_named("poems")
