"""parse_row: one object's fields, or what is wrong, in which column."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorafit.data.sources.raw_row import Reject, parse_row


def rejected(raw: bytes) -> Reject:
    result = parse_row(raw)
    assert isinstance(result, Reject)
    return result


@given(st.binary(max_size=60))
def test_any_bytes_give_fields_or_a_reject(raw: bytes) -> None:
    result = parse_row(raw)
    assert isinstance(result, Reject) or result == json.loads(raw)


@pytest.mark.parametrize(
    ("raw", "code", "column", "reason"),
    [
        (b'{"a": 1,}', "D001", 9, "trailing comma before '}'"),
        (b'{"a": [1,]}', "D001", 10, "trailing comma before ']'"),
        (b'{"a": "cut', "D001", 7, "cut off before its end"),
        (b'{"a": 1', "D001", 8, "cut off before its end"),
        (b"{'a': 1}", "D001", 2, "single quotes; JSON wants double ones"),
        (b'{"a": 1} {"b": 2}', "D001", 10, "more text after the object; one object per line"),
        (b'{"a": x}', "D001", 7, "expecting value"),
        (b"[1, 2]", "D002", 1, "the line is an array, not an object"),
        (b'"text"', "D002", 1, "the line is a text, not an object"),
        (b"7", "D002", 1, "the line is a number, not an object"),
        (b"null", "D002", 1, "the line is null, not an object"),
        (b"true", "D002", 1, "the line is true or false, not an object"),
        (b'{"a": 1, "b": 2, "a": 3}', "D003", 0, "the field 'a' stands twice"),
        ('{"a": "é'.encode() + b'\xe9"}', "D004", 9, 'byte 0xe9 is not UTF-8 (Latin-1 would read \'{"a": "Ã©é"}\')'),
        (b'{"a": "x\0y"}', "D005", 9, "raw control character '\\x00' inside a text"),
        (b'{"a": "x\ty"}', "D005", 9, "raw control character '\\t' inside a text"),
        (b'\0\0{"a": 1}', "D005", 1, "raw NUL bytes"),
        (b'{"a": "\xed\xa0\x80"}', "D043", 8, "holds half a surrogate pair"),
    ],
)
def test_a_broken_row_is_named_with_its_column(raw: bytes, code: str, column: int, reason: str) -> None:
    result = rejected(raw)
    assert (result.code, result.column, result.reason) == (code, column, reason)


def test_a_fault_in_a_row_of_several_lines_stands_on_its_own_line() -> None:
    result = rejected(b'{"a": 1,\n  "b": x}')
    assert (result.line_offset, result.column) == (1, 8)
    assert result.place("rows.json", 10) == "rows.json:11:8"


def test_the_excerpt_shows_the_text_around_the_fault() -> None:
    assert 'response": oops' in rejected(b'{"instruction": "a", "response": oops}').excerpt


@pytest.mark.parametrize("raw", [b"[" * 100_000, b'{"a":' * 1_000 + b"1" + b"}" * 1_000, b'{"a": ' + b"[" * 65])
def test_deep_nesting_is_refused_before_it_can_hurt(raw: bytes) -> None:
    assert rejected(raw).code == "D007"


def test_brackets_inside_a_text_are_not_nesting() -> None:
    assert not isinstance(parse_row(b'{"a": "' + b"[" * 500 + b'"}'), Reject)


def test_a_number_too_long_to_convert_is_a_reject() -> None:
    assert rejected(b'{"a": ' + b"9" * 10_000 + b"}").code == "D001"
