"""Gathering: chunks are bounded in rows and in bytes."""

import pytest

from lorafit.data import gather
from lorafit.data.sources.raw_row import RawRow


def test_large_rows_come_in_small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gather, "CHUNK_BYTES", 100)
    monkeypatch.setattr(gather, "CHUNK_ROWS", 5)
    rows = [RawRow(0, number, b"x" * (60 if number < 4 else 1)) for number in range(12)]
    chunks = list(gather._chunks(rows))
    assert [len(chunk) for chunk in chunks] == [2, 2, 5, 3]
    assert [row.line for chunk in chunks for row in chunk] == list(range(12))
