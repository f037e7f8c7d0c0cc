"""Records from rows that are already Python mappings: the Python API's way in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from lorafit.data.codes import CODES
from lorafit.data.conversations import up_to_last_answer
from lorafit.data.judgements import judged
from lorafit.data.records import Record
from lorafit.data.rejects import Reject
from lorafit.data.shapes import detect
from lorafit.errors import DataError


def parse_rows(raw_rows: Iterable[Mapping[str, Any]], map: Mapping[str, str] | None = None) -> list[Record]:
    """The records that rows in any known shape spell; `map` names fields as `{"response": "answer_text"}`.

    Raises DataError for the first row that does not fit; its place is `row:N`, counted from 1.
    """
    rows = list(raw_rows)
    if not rows:
        raise DataError("there are no rows", fix="pass at least one mapping")
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, Mapping):
            raise DataError(f"is a {type(row).__name__}, not a mapping", where=f"row:{number}", fix="pass dicts")
    shape = detect(rows, map or {}, "rows")
    records: list[Record] = []
    for number, row in enumerate(rows, start=1):
        record = shape.record(row, f"row:{number}")
        if isinstance(record, Reject):
            raise DataError(record.reason, where=f"row:{number}", fix="mend or leave out the row")
        if fault := next((seen for code, seen in judged(record) if CODES[code].rejects), ""):
            raise DataError(fault, where=record.source, fix="mend or leave out the row")
        records.append(up_to_last_answer(record))
    return records
