"""JSON arrays: streamed element by element, whatever the block size, with broken ones contained."""

import io
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorafit.data.sources import reader as module
from lorafit.data.sources.reader import Elements

LEAVES = st.none() | st.booleans() | st.integers() | st.text(max_size=8)
OBJECTS = st.dictionaries(
    st.text(max_size=4),
    st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner)),
    max_size=4,
)


def cut(data: bytes, block: int = 1 << 20) -> tuple[list[tuple[int, bytes, int]], Elements]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BLOCK_BYTES", block)
        elements = Elements(io.BytesIO(data))
        return list(elements), elements


@given(st.lists(OBJECTS, max_size=4), st.sampled_from([None, 1]), st.integers(1, 40))
def test_elements_are_those_of_the_json_library(rows: list[Any], indent: int | None, block: int) -> None:
    elements, state = cut(b" \n" + json.dumps(rows, indent=indent, ensure_ascii=False).encode() + b"\n", block)
    assert [json.loads(raw) for _, raw, _ in elements] == rows
    assert state.closed


@given(st.text(alphabet='"\\\na,{}[] ', max_size=25), st.integers(1, 5))
def test_broken_arrays_are_cut_the_same_way_whatever_the_block_size(text: str, block: int) -> None:
    small, small_state = cut(f"[{text}".encode(), block)
    whole, whole_state = cut(f"[{text}".encode())
    assert small == whole
    assert (small_state.closed, small_state.line) == (whole_state.closed, whole_state.line)


def test_an_element_stands_on_the_line_where_it_starts() -> None:
    elements, _ = cut(b'[\n {"a":\n  1},\n\n {"b": 2}\n]')
    assert [(line, json.loads(raw)) for line, raw, _ in elements] == [(2, {"a": 1}), (5, {"b": 2})]


def test_a_broken_text_does_not_swallow_the_elements_after_it() -> None:
    elements, _ = cut(b'[\n {"a": "x, "b": 1},\n {"a": "y"}\n]')
    assert elements[-1] == (3, b'{"a": "y"}', 10)


def test_an_array_without_its_end_is_not_closed() -> None:
    assert not cut(b'[{"a": 1}, {"b"')[1].closed


def test_needless_commas_are_counted_and_cost_no_row() -> None:
    elements, state = cut(b'[{"a": 1},, {"b": 2},]')
    assert len(elements) == 2
    assert state.strays == 2
    assert cut(b"[]")[1].strays == 0


def test_what_follows_the_array_is_an_element_that_can_be_named() -> None:
    elements, _ = cut(b'[{"a": 1}]\n{"b": 2}')
    assert [raw for _, raw, _ in elements] == [b'{"a": 1}', b'{"b": 2}']


def test_a_huge_element_comes_cut_with_its_full_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LINE_LIMIT_BYTES", 20)
    elements, state = cut(b'[{"a": "' + b"x\\n" * 500 + b'"},\n{"b": 1}]', 16)
    assert [(line, len(raw), length) for line, raw, length in elements] == [(1, 20, 1509), (2, 8, 8)]
    assert state.closed
