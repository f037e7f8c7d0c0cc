"""Lines: whatever the bytes, numbers are right and memory is bounded."""

import io
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorafit.data.sources import files as module
from lorafit.data.sources.files import Utf8Stream, lines


def read(data: bytes) -> list[tuple[int, bytes, int]]:
    return list(lines(io.BytesIO(data)))


@given(st.binary(max_size=200), st.integers(1, 20))
def test_lines_are_those_of_split_whatever_the_block_size(data: bytes, block: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BLOCK_BYTES", block)
        pieces = data.split(b"\n")
        expected = pieces[:-1] if pieces[-1] == b"" else pieces
        assert read(data) == [(number, piece, len(piece)) for number, piece in enumerate(expected, start=1)]


def test_a_line_over_the_limit_comes_cut_with_its_full_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK_BYTES", 7)
    monkeypatch.setattr(module, "LINE_LIMIT_BYTES", 10)
    assert read(b"ab\n" + b"x" * 95 + b"\ncd") == [(1, b"ab", 2), (2, b"x" * 10, 95), (3, b"cd", 2)]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-8-sig"])
def test_a_byte_order_mark_decides_the_encoding(encoding: str) -> None:
    file_warnings: Counter[str] = Counter()
    stream = Utf8Stream(io.BytesIO('{"a": "日本🙂"}\n'.encode(encoding)), file_warnings)
    assert b"".join(iter(lambda: stream.read(3), b"")).decode() == '{"a": "日本🙂"}\n'
    assert sum(file_warnings.values()) == 1


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf16_without_a_mark_is_known_by_its_zeros(encoding: str) -> None:
    stream = Utf8Stream(io.BytesIO('{"a": "ü"}'.encode(encoding)), Counter())
    assert b"".join(iter(lambda: stream.read(5), b"")).decode() == '{"a": "ü"}'


def test_half_a_surrogate_in_utf16_stays_bytes_that_utf8_forbids() -> None:
    stream = Utf8Stream(io.BytesIO(b'\xff\xfe{\0"\0\x00\xd8"\0}\0'), Counter())
    with pytest.raises(UnicodeDecodeError):
        b"".join(iter(lambda: stream.read(64), b"")).decode()


def test_utf16_cut_off_in_a_character_shows_a_replacement_character() -> None:
    stream = Utf8Stream(io.BytesIO('{"a"'.encode("utf-16") + b"\x41"), Counter())
    assert b"".join(iter(lambda: stream.read(64), b"")).decode() == '{"a"�'
