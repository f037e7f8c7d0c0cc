"""parse_rows: rows from Python, with the place of the first that does not fit."""

from typing import Any

import pytest

from lorafit.data import parse_rows
from lorafit.data.schema.records import Record, Turn
from lorafit.errors import DataError


def test_rows_become_records_numbered_from_one() -> None:
    records = parse_rows([{"question": "a", "answer": "b"}, {"question": "c", "answer": "d"}], {"prompt": "question"})
    assert records[1] == Record((Turn("user", "c"), Turn("assistant", "d")), "row:2")


@pytest.mark.parametrize(
    ("rows", "what"),
    [
        ([], "there are no rows"),
        ([{"prompt": "a", "completion": "b"}, {"prompt": "a"}], "row:2: no field 'completion'"),
        ([{"prompt": "a", "completion": " "}], "row:1: the response is empty"),
        ([{"prompt": "a \ud800", "completion": "b"}], "row:1: holds half a surrogate pair"),
        (["text"], "row:1: is a str, not a mapping"),
        ([{"words": "a"}], "the rows' fields"),
    ],
)
def test_a_row_that_does_not_fit_is_one_sentence(rows: list[Any], what: str) -> None:
    with pytest.raises(DataError, match=what):
        parse_rows(rows)
