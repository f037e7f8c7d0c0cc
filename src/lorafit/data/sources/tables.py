"""Tables: rows of CSV files and hub datasets. No value is guessed."""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cache
from itertools import chain
from typing import Any

from lorafit.config import one_line
from lorafit.data.sources.files import LINE_LIMIT_BYTES, DataFile, Readable, lines
from lorafit.data.sources.raw_row import RawRow, Reject, excerpt
from lorafit.errors import DataError

SEPARATORS = (",", ";", "\t", "|")


class CsvLines:
    """The lines of a CSV file as text. Bytes that are not UTF-8 travel as half surrogates, and the row reports them.

    `cut` says that a line since it was last cleared was longer than the limit, and is not whole.
    """

    def __init__(self, stream: Readable) -> None:
        self.lines, self.cut = lines(stream), False

    def __iter__(self) -> CsvLines:
        return self

    def __next__(self) -> str:
        _, raw, length = next(self.lines)
        self.cut |= length > LINE_LIMIT_BYTES
        return raw.decode("utf-8", "surrogateescape") + "\n"


def csv_rows(stream: Readable, index: int, file: DataFile, file_warnings: Counter[str]) -> Iterator[RawRow]:
    """Yield the rows under the header line. The place of a row is its first line.

    Excel's `sep=` line names the separator. Rows of blank cells are counted and passed by.
    """
    csv.field_size_limit(LINE_LIMIT_BYTES)
    text = CsvLines(stream)
    before, head = 0, _next_line(text)
    while head and not head.strip():
        before, head = before + 1, _next_line(text)
    if named := SEPARATOR_LINE.fullmatch(head.strip("\r\n")):
        before, head = before + 1, _next_line(text)
    follows = next(text, "")
    separator = named[1].replace("\\t", "\t") if named else _separator(head, follows)
    table: Any = csv.reader(chain((head, follows), text), delimiter=separator, strict=True)
    if _is_rule(head) or _is_rule(follows):
        file_warnings["table drawn with lines"] += 1
        table = DrawnTable(chain((head, follows), text))
    header = _header(table, file, before + 1)
    if not header[0]:
        file_warnings["index column without a name"] += 1
    was_cut = text.cut  # the first row has been read to find the separator
    while True:
        start, text.cut, was_cut = before + table.line_num + 1, was_cut, False
        try:
            cells = next(table, None)
        except csv.Error as error:
            yield RawRow(index, start, b"", reject=Reject("D053", str(error)))
            continue
        if cells is None:
            return
        if text.cut:
            yield RawRow(index, start, b"", reject=Reject("D006", "a line of the row is over 16 MiB long"))
        elif any(map(str.strip, cells)):
            yield _csv_row(index, start, header, cells)
        elif cells:
            file_warnings["row of blank cells"] += 1


def _is_rule(line: str) -> bool:
    """Return True for a line that only draws a table: |---|---| in Markdown, +---+---+ or ---+--- of databases."""
    marks = set(line.strip())
    return "-" in marks and marks <= set("|+-=: \t") and bool(marks & set("|+"))


class DrawnTable:
    """The rows of a table that is drawn with lines, as Markdown and databases' shells write it."""

    def __init__(self, text: Iterator[str]) -> None:
        self.text, self.line_num, self.rules = text, 0, 0

    def __iter__(self) -> DrawnTable:
        return self

    def __next__(self) -> list[str]:
        for line in self.text:
            self.line_num += 1
            bare = line.strip()
            if _is_rule(line) and (bare[0] == "+" or not self.rules):
                self.rules += 1
                continue
            if ROWS_COUNTED.fullmatch(bare):
                continue
            if bare[:1] == "|":
                bare = bare[1:].removesuffix("|")
            return [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", bare)]
        raise StopIteration


ROWS_COUNTED = re.compile(r"\(\d+ rows?\)|\d+ rows? in set.*")
SEPARATOR_LINE = re.compile(r'"?sep= ?(\\t|.)"?[,;\t| ]*', re.IGNORECASE)


def _next_line(text: Iterator[str]) -> str:
    """Return the next line without the byte order mark of a file that was appended; empty at the end."""
    return next(text, "").lstrip("\ufeff")


def _separator(header: str, follows: str) -> str:
    """Return the separator that makes most cells of the header, and as many of the line below where that decides."""
    widths = {one: (_width(header, one), _width(follows, one)) for one in SEPARATORS}
    return max(SEPARATORS, key=lambda one: (widths[one][0] > 1 and len({*widths[one]}) == 1, widths[one][0]))


def _width(line: str, separator: str) -> int:
    try:
        return len(next(csv.reader((line,), delimiter=separator, strict=True), ()))
    except csv.Error:  # a quoted cell goes on in the next line
        return 0


def _header(table: Iterator[list[str]], file: DataFile, line: int) -> list[str]:
    """Return the column names. One without a name stays "" (an index, or Excel's empty columns)."""
    where = f"{file.name}:{line}"
    try:
        header = [name.strip() for name in next(table, [])]
    except csv.Error as error:
        raise DataError(f"the header line is broken ({error})", where=where, fix="close each quote of it") from error
    if twice := [name for name, count in Counter(header).items() if name and count > 1]:
        what = f"the header line names the column '{excerpt(twice[0])}' twice"
        raise DataError(what, where=where, fix="rename one of the two")
    if not any(header):
        raise DataError("the first line names no column", where=where, fix="write the columns' names into it")
    return header


def _title_fix(header: list[str]) -> str:
    """Return the fix for a table whose first line is a title or a remark; empty for a line of several names."""
    return "delete the lines above the columns' names" if sum(map(bool, header)) == 1 else ""


def _csv_row(index: int, line: int, header: list[str], cells: list[str]) -> RawRow:
    raw = json.dumps(cells, ensure_ascii=False).encode("utf-8", "surrogateescape")
    if len(cells) != len(header):
        if any(cell.strip() for cell in cells[len(header) :]) or len(cells) < len(header):
            reason = f"{len(cells)} cells under a header of {len(header)}"
            return RawRow(index, line, raw, reject=Reject("D008", reason, fix=_title_fix(header)))
        cells = cells[: len(header)]
    for place, (name, cell) in enumerate(zip(header, cells, strict=True)):
        if not cell.isascii() and any("\udc80" <= char <= "\udcff" for char in cell):
            reject = Reject("D004", f"the cell '{excerpt(name)}' holds bytes that are not UTF-8")
            return RawRow(index, line, raw, reject=reject)
        if not name and cell.strip() and not (place == 0 and cell.strip().isdigit()):
            fix = _title_fix(header) or "name the column in the header"
            reject = Reject("D008", f"cell {place + 1} has no column name", fix=fix)
            return RawRow(index, line, raw, reject=reject)
    return RawRow(index, line, raw, {name: cell for name, cell in zip(header, cells, strict=True) if name})


def without_nulls(value: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the row without the nulls that Arrow adds to nested records for missing fields."""
    return {name: _pruned(cell) if isinstance(cell, list | dict) else cell for name, cell in value.items()}


def _pruned(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _pruned(cell) for name, cell in value.items() if cell is not None}
    if isinstance(value, list):
        if value and all(isinstance(cell, tuple) for cell in value):  # Arrow's map
            return {str(name): _pruned(cell) for name, cell in value if cell is not None}
        return [_pruned(cell) for cell in value]
    return value


REACH_S = 3.0


@cache
def hub_dataset(hub_id: str) -> Any:
    """Return the `train` split of the dataset `hub_id`, memory-mapped by `datasets`. Raises DataError."""
    # imported here: they take seconds, and a local file never needs them
    import datasets
    from huggingface_hub import constants

    if not constants.is_offline_mode() and not _answers(constants.ENDPOINT):
        raise DataError(
            f"'{hub_id}' is no local file, and the hub cannot be reached",
            fix="check the path or the network; HF_HUB_OFFLINE=1 uses what was downloaded before",
        )
    try:
        return datasets.load_dataset(hub_id, split="train")
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"'{hub_id}' is no local file, and no dataset with a train split either ({one_line(error)})",
            fix="check the name, or download it once and pass the files",
        ) from error


def _answers(endpoint: str) -> bool:
    """Return True if the hub can be reached. It is asked first, because `datasets` would retry for half a minute."""
    # imported here, as `datasets` is: a local file never needs them
    import socket
    from urllib.parse import urlsplit
    from urllib.request import getproxies

    parts = urlsplit(endpoint)
    if getproxies():
        return True
    try:
        with socket.create_connection((parts.hostname or "", parts.port or 443), timeout=REACH_S):
            return True
    except OSError:
        return False


def hub_rows(index: int, file: DataFile) -> Iterator[RawRow]:
    """Yield the rows of the dataset, numbered from 1."""
    for number, fields in enumerate(hub_dataset(file.hub_id), start=1):
        yield RawRow(index, number, b"", without_nulls(fields))


def hub_fingerprint(file: DataFile) -> str:
    """Return a value that changes with the dataset."""
    return str(hub_dataset(file.hub_id)._fingerprint)
