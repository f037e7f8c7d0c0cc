"""Rows: what went in comes out, from memory and from disk, by position."""

import hashlib
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import made_data as made
from lorafit.data.schema.records import Record, Turn
from lorafit.data.store import Rows, record_from_json, record_to_json
from lorafit.data.template.template import Encoded

TEXT = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=10)
TURNS = st.builds(Turn, st.sampled_from(["user", "assistant"]), TEXT, st.dictionaries(TEXT, TEXT, max_size=2))
RECORDS = st.builds(Record, st.lists(TURNS, min_size=1, max_size=3).map(tuple), st.just("a.jsonl:3"), TEXT | st.none())
TOKENS = st.lists(st.tuples(st.integers(0, 2**31 - 1), st.booleans()), max_size=20)


def encoded(*rows: list[tuple[int, bool]]) -> list[Encoded]:
    return [Encoded([token for token, _ in row], [mask for _, mask in row]) for row in rows]


@given(st.lists(TOKENS, max_size=5))
def test_ids_and_masks_come_back_as_they_went_in(tokens: list[list[tuple[int, bool]]]) -> None:
    rows = Rows.from_encoded(encoded(*tokens))
    assert len(rows) == len(tokens)
    for place, row in enumerate(tokens):
        assert rows.ids(place).dtype == np.int32
        assert rows.mask(place).dtype == np.bool_
        assert list(zip(rows.ids(place).tolist(), rows.mask(place).tolist(), strict=True)) == row
    assert rows.lengths.tolist() == [len(row) for row in tokens]
    assert rows.supervised.tolist() == [sum(mask for _, mask in row) for row in tokens]


@given(RECORDS)
def test_a_record_survives_its_json(record: Record) -> None:
    assert record_from_json(record_to_json(record), record.source) == record


def test_a_record_keeps_its_tools() -> None:
    record = Record((Turn("user", "a"),), "x:1", None, ({"type": "function"},))
    assert record_from_json(record_to_json(record), "x:1") == record


def test_half_a_surrogate_in_a_tool_call_does_not_stop_the_reading() -> None:
    record = Record((Turn("assistant", "ü", {"tool_calls": [{"arguments": "\ud800"}]}),), "x:1")
    assert record_from_json(record_to_json(record), "x:1") == record


def some_rows() -> Rows:
    tokens = [[(10 * row + place, place > 0) for place in range(row + 1)] for row in range(5)]
    records = [Record((Turn("user", f"q{row}"), Turn("assistant", "a")), f"f{row % 2}.jsonl:{row}") for row in range(5)]
    return Rows.from_encoded(encoded(*tokens), records)


def test_selected_rows_keep_order_source_and_record() -> None:
    rows = some_rows().select([3, 1]).select(np.array([1, 0]))
    assert [rows.source(place) for place in range(2)] == ["f1.jsonl:1", "f1.jsonl:3"]
    assert [rows.record(place).turns[0].content for place in range(2)] == ["q1", "q3"]
    assert rows.lengths.tolist() == [2, 4]
    assert len(some_rows().select([])) == 0


def test_the_content_hash_is_that_of_ids_and_masks_in_order() -> None:
    rows = some_rows()
    digest = hashlib.sha256(np.array([1, 2, 3, 4, 5], "<i4").tobytes())
    for row in range(5):
        stored = [10 * row + place + (-(2**31) if place > 0 else 0) for place in range(row + 1)]
        digest.update(np.array(stored, "<i4").tobytes())
    assert rows.content_hash == digest.hexdigest()
    assert rows.select([1, 0]).content_hash != rows.select([0, 1]).content_hash


def test_rows_without_records_say_so() -> None:
    with pytest.raises(AssertionError, match="without their records"):
        Rows.from_encoded(encoded([(1, True)])).record(0)


def test_rows_on_disk_are_mapped_and_travel_to_workers_by_path(tmp_path: Path) -> None:
    path = made.write(tmp_path / "rows.jsonl", [made.row(number) for number in range(200)])
    rows = made.prepared(path, holdout=0.0).train
    travelled = pickle.dumps(rows.select([5, 7]))
    assert len(travelled) < 4000
    again = pickle.loads(travelled)
    assert [again.source(place) for place in range(2)] == [f"{path}:6", f"{path}:8"]
    assert again.record(1) == rows.record(7)
    assert isinstance(again.store.text, np.memmap)
