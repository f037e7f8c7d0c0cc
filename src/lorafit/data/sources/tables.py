"""Rows of CSV files and hub data sets; no value is guessed."""

from __future__ import annotations

import csv
import json
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
    """The lines of a CSV file as text; bytes that are not UTF-8 travel as half surrogates, for the row to name.

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


def csv_rows(stream: Readable, index: int, file: DataFile) -> Iterator[RawRow]:
    """The rows under the header line; a row's place is the line it starts on."""
    csv.field_size_limit(LINE_LIMIT_BYTES)
    text = CsvLines(stream)
    first = next(text, "")
    table = csv.reader(chain([first], text), delimiter=_separator(first), strict=True)
    header = _header(table, file)
    while True:
        start, text.cut = table.line_num + 1, False
        try:
            cells = next(table, None)
        except csv.Error as error:
            yield RawRow(index, start, b"", reject=Reject("D001", f"broken CSV: {error}"))
            continue
        if cells is None:
            return
        if text.cut:
            yield RawRow(index, start, b"", reject=Reject("D006", "a line of the row is over 16 MiB long"))
        elif cells:
            yield _csv_row(index, start, header, cells)


def _separator(header: str) -> str:
    return max(SEPARATORS, key=header.count)


def _header(table: Iterator[list[str]], file: DataFile) -> list[str]:
    try:
        header = [name.strip() for name in next(table, [])]
    except csv.Error as error:
        raise DataError(f"the header line is broken ({error})", where=f"{file.name}:1", fix="mend it") from error
    if len(set(header)) != len(header) or not all(header):
        raise DataError("the header line names a column twice or not at all", where=f"{file.name}:1", fix="mend it")
    return header


def _csv_row(index: int, line: int, header: list[str], cells: list[str]) -> RawRow:
    raw = json.dumps(cells, ensure_ascii=False).encode("utf-8", "surrogateescape")
    if len(cells) != len(header):
        reason = f"{len(cells)} cells under a header of {len(header)}"
        return RawRow(index, line, raw, reject=Reject("D008", reason))
    for name, cell in zip(header, cells, strict=True):
        if not cell.isascii() and any("\udc80" <= char <= "\udcff" for char in cell):
            reject = Reject("D004", f"the cell '{excerpt(name)}' holds bytes that are not UTF-8")
            return RawRow(index, line, raw, reject=reject)
    return RawRow(index, line, raw, dict(zip(header, cells, strict=True)))


def without_nulls(value: Mapping[str, Any]) -> Mapping[str, Any]:
    """The row with the nulls taken out that Arrow puts into nested records for fields they do not have."""
    return {name: _pruned(cell) if isinstance(cell, list | dict) else cell for name, cell in value.items()}


def _pruned(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _pruned(cell) for name, cell in value.items() if cell is not None}
    if isinstance(value, list):
        return [_pruned(cell) for cell in value]
    return value


REACH_S = 3.0


@cache
def hub_dataset(hub_id: str) -> Any:
    """The `train` split of the dataset `hub_id`, memory-mapped by `datasets`. Raises DataError."""
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
    """Whether the hub can be reached; asked first, because `datasets` would retry for half a minute."""
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
    """The rows of the dataset; a row's place counts from 1."""
    for number, fields in enumerate(hub_dataset(file.hub_id), start=1):
        yield RawRow(index, number, b"", without_nulls(fields))


def hub_fingerprint(file: DataFile) -> str:
    """What changes when the dataset does."""
    return str(hub_dataset(file.hub_id)._fingerprint)
