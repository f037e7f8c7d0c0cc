"""RowReader: every row of every file, in order, whatever the format; bad rows come out as rejects."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from lorafit.data.arrays import Elements
from lorafit.data.hub import hub_rows
from lorafit.data.lines import LINE_LIMIT_BYTES, Utf8Stream, lines
from lorafit.data.raw_rows import CUT_OFF, RawRow, parse_row
from lorafit.data.rejects import Reject
from lorafit.data.sources import ByteStream, DataFile, reading
from lorafit.data.tables import csv_rows, parquet_rows
from lorafit.errors import DataError

HEAD_BYTES = 1 << 16


class RowReader:
    """Iterates over the rows of `files`. `bytes_done` and `oddities` (what was read past, per file) grow meanwhile."""

    def __init__(self, files: Sequence[DataFile]) -> None:
        self.files = files
        self.bytes_total = sum(file.size_bytes for file in files)
        self.bytes_done = 0
        self.oddities: dict[int, Counter[str]] = {index: Counter() for index in range(len(files))}

    def __iter__(self) -> Iterator[RawRow]:
        before = 0
        for index, file in enumerate(self.files):
            yield from self._rows_of(index, file, before)
            before += file.size_bytes
            self.bytes_done = before

    def _rows_of(self, index: int, file: DataFile, before: int) -> Iterator[RawRow]:
        if file.format == "hub":
            yield from hub_rows(index, file)
        elif file.format == "parquet":
            yield from parquet_rows(index, file, lambda share: self._at(before + int(share * file.size_bytes)))
        else:
            yield from self._text_rows(index, file, before)

    def _at(self, bytes_done: int) -> None:
        self.bytes_done = bytes_done

    def _text_rows(self, index: int, file: DataFile, before: int) -> Iterator[RawRow]:
        with reading(file):
            disk = ByteStream(file)
            try:
                stream = Utf8Stream(disk, self.oddities[index])
                head = _first_text(stream)
                for row in self._by_format(index, file, _Rewound(stream, head), head):
                    self.bytes_done = before + disk.bytes_done
                    yield row
            finally:
                disk.close()

    def _by_format(self, index: int, file: DataFile, stream: _Rewound, head: bytes) -> Iterator[RawRow]:
        if file.format == "csv":
            return csv_rows(stream, index, file)
        start = head.lstrip()
        if start.startswith(b"[") and (file.format == "json" or _opens_an_array(start)):
            return array_rows(stream, index, self.oddities[index])
        if file.format == "json" and start.startswith(b"{") and _is_one_object(start):
            raise DataError("holds one JSON object, not a list of rows", where=file.name, fix="save the list itself")
        return jsonl_rows(stream, index, self.oddities[index])


class _Rewound:
    """A stream whose `head` has been read already and comes first again."""

    def __init__(self, stream: Utf8Stream, head: bytes) -> None:
        self.stream, self.head = stream, head

    def read(self, size: int) -> bytes:
        """`head`, then the stream."""
        head, self.head = self.head, b""
        return head or self.stream.read(size)


def _first_text(stream: Utf8Stream) -> bytes:
    """The first bytes, enough to see what kind of file it is; blanks before them are part of it."""
    head = b""
    while len(head.lstrip()) < HEAD_BYTES and len(head) < LINE_LIMIT_BYTES and (block := stream.read(HEAD_BYTES)):
        head += block
    return head


def _is_one_object(start: bytes) -> bool:
    """Whether an object goes on over several lines: then the file is that object, and not one row per line."""
    first, newline, _ = start.partition(b"\n")
    parsed = parse_row(first)
    return bool(newline) and isinstance(parsed, Reject) and parsed.reason == CUT_OFF


def _opens_an_array(start: bytes) -> bool:
    """In a .jsonl file: an array of objects over several lines, and not one line that happens to be an array."""
    first, newline, _ = start.partition(b"\n")
    return start[1:].lstrip()[:1] in (b"{", b"") and not (newline and first.rstrip().endswith(b"]"))


def jsonl_rows(stream: _Rewound, index: int, oddities: Counter[str]) -> Iterator[RawRow]:
    """One row per line; blank lines are counted and passed by."""
    for number, raw, length in lines(stream):
        if raw.endswith(b"\r"):
            raw = raw[:-1]
            oddities["CRLF line end"] += 1
        if not raw.strip():
            oddities["blank line"] += 1
            continue
        yield _row(index, number, raw, length)


def array_rows(stream: _Rewound, index: int, oddities: Counter[str]) -> Iterator[RawRow]:
    """One row per element of a top-level array."""
    elements = Elements(stream)
    broken = False
    for number, raw, length in elements:
        row = _row(index, number, raw, length)
        broken = row.reject is not None
        yield row
    if elements.strays:
        oddities["needless comma"] += elements.strays
    if not elements.closed and not broken:  # a last element that is cut off has said so itself
        yield RawRow(index, elements.line, b"", reject=Reject("D001", "the array is cut off: its ']' is missing"))


def _row(index: int, number: int, raw: bytes, length: int) -> RawRow:
    if length > LINE_LIMIT_BYTES:
        reject = Reject("D006", f"the line is {length / 2**20:.0f} MiB long")
        return RawRow(index, number, raw, reject=reject)
    parsed = parse_row(raw)
    if isinstance(parsed, Reject):
        return RawRow(index, number, raw, reject=parsed)
    return RawRow(index, number, raw, parsed)
