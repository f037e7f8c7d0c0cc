"""Reader: the rows of data files, and the elements of a JSON array as a stream in bounded memory."""

from __future__ import annotations

import codecs
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lorafit.data.schema.unknown_rows import container
from lorafit.data.sources.discovery import find_files
from lorafit.data.sources.files import (
    BLOCK_BYTES,
    LINE_LIMIT_BYTES,
    MAX_UNPACKED,
    ByteStream,
    DataFile,
    Readable,
    Utf8Stream,
    lines,
    reading,
)
from lorafit.data.sources.kinds import (
    binary_kind,
    objects_one_below_another,
    on_one_line_each,
    text_format,
    text_kind,
    written_otherwise,
)
from lorafit.data.sources.parquet import arrow_rows, parquet_rows
from lorafit.data.sources.raw_row import CUT_OFF, RawRow, Reject, parse_row
from lorafit.data.sources.tables import csv_rows, hub_rows
from lorafit.errors import DataError

Element = tuple[int, bytes, int]
"""(line it starts on, bytes cut to the limit, full length in bytes)"""

INSIDE = rb'[^"\\\n]*+(?:\\[^\n][^"\\\n]*+)*+'
FLAT = rb'[^"{}\[\]]*+(?:"' + INSIDE + rb'"[^"{}\[\]]*+)*+'
TOKEN = re.compile(
    rb"\{" + FLAT + rb"\}"  # a whole object without others in it: most rows
    rb'|"' + INSIDE + rb'"'  # a whole text
    rb'|"' + INSIDE + rb"\\?\n"  # a text that a line end breaks: JSON forbids that
    rb'|"' + INSIDE + rb"\\?\Z"  # a text that the end of the buffer cuts
    rb"|[\[\]{},]"
)
REST_OF_TEXT = re.compile(INSIDE)
QUOTE, BACKSLASH = b'"', b"\\"


class Elements:
    """Cut the elements of a top-level array out of a UTF-8 stream that starts with `[`, blanks allowed.

    Whatever stands between commas is an element, so that broken ones are named rather than skipped; a text that
    runs into a line end breaks its element there, so that it does not swallow the rest of the file. When the
    iteration is over `closed` tells whether the `]` was found, `line` where, and `strays` counts needless commas.
    """

    def __init__(self, stream: Readable) -> None:
        self.stream, self.buffer = stream, b""
        self.line = self.began = 1
        self.closed = self.opened = False
        self.start = self.scan = self.depth = self.length = 0
        self.in_text = self.since_comma = False
        self.strays = 0
        self.kept = bytearray()  # what is already known of the element that the buffer goes on with

    def __iter__(self) -> Iterator[Element]:
        while not self.closed:
            block = self.stream.read(BLOCK_BYTES)
            if not block:
                yield from self._element(len(self.buffer))
                return
            self._set_aside()
            self.buffer += block
            yield from self._complete_ones()
        yield from self._rest()

    def _rest(self) -> Iterator[Element]:
        """Yield one element if anything follows the `]`."""
        while self.buffer:
            self.scan = len(self.buffer)
            self._set_aside()
            self.buffer = self.stream.read(BLOCK_BYTES)
        yield from self._element(0)

    def _set_aside(self) -> None:
        """Move the scanned part of the unfinished element out of the buffer, and forget what exceeds the limit."""
        self._keep(self.buffer[self.start : self.scan])
        self.buffer, self.start, self.scan = self.buffer[self.scan :], 0, 0

    def _keep(self, piece: bytes) -> None:
        self.length += len(piece)
        self.kept += piece[: LINE_LIMIT_BYTES - len(self.kept)]
        self.line += piece.count(b"\n")

    def _complete_ones(self) -> Iterator[Element]:
        if self.in_text:
            yield from self._go_on_in_text()
        if self.in_text:
            return
        for match in TOKEN.finditer(self.buffer, self.scan):
            token = match[0]
            self.scan = match.end()
            if token[:1] == QUOTE:
                if token[-1:] == b"\n":
                    yield from self._break_off()
                elif self.scan == len(self.buffer) and not self._is_whole(token):
                    self._cut_in_text(token)
                    return
            elif len(token) > 1:
                continue  # an object, opened and closed
            elif token in b"[{":
                self._open(match.end())
            elif self.depth and token in b"]}":
                self.depth -= 1
            elif self.depth == 0 and token in b",]":
                yield from self._ended(token, match.start(), match.end())
                if self.closed:
                    return
        self.scan = len(self.buffer)

    def _ended(self, token: bytes, start: int, end: int) -> Iterator[Element]:
        whole = list(self._element(start))
        self.strays += not whole and (token == b"," or self.since_comma)
        self.start, self.closed, self.since_comma = end, token == b"]", token == b","
        yield from whole

    def _break_off(self) -> Iterator[Element]:
        """End the element at the line end that breaks its text."""
        yield from self._element(self.scan)
        self.start, self.depth, self.since_comma = self.scan, 0, False

    def _open(self, end: int) -> None:
        if self.opened:
            self.depth += 1
        else:
            self.opened = True
            self._keep(self.buffer[self.start : end])
            self.kept, self.length, self.began = bytearray(), 0, self.line
            self.start = end

    @staticmethod
    def _is_whole(token: bytes) -> bool:
        match = REST_OF_TEXT.match(token, 1)
        return len(token) > 1 and match is not None and token[match.end() :] == QUOTE

    def _cut_in_text(self, token: bytes) -> None:
        self.in_text = True
        # an escape needs its second byte: leave a lone backslash for the next block
        self.scan -= (len(token) - len(token.rstrip(BACKSLASH))) % 2

    def _go_on_in_text(self) -> Iterator[Element]:
        match = REST_OF_TEXT.match(self.buffer, self.scan)
        assert match is not None
        self.scan = match.end()
        follows = self.buffer[self.scan : self.scan + 2]
        if follows in (b"", BACKSLASH):
            return
        self.in_text = False
        self.scan += follows.index(QUOTE if follows[:1] == QUOTE else b"\n") + 1
        if follows[:1] != QUOTE:
            yield from self._break_off()

    def _element(self, end: int) -> Iterator[Element]:
        self._keep(self.buffer[self.start : end])
        raw, length = bytes(self.kept), self.length
        stripped = raw.lstrip()
        line = self.began + raw.count(b"\n", 0, len(raw) - len(stripped))
        self.kept, self.length, self.began = bytearray(), 0, self.line
        if stripped := stripped.rstrip():
            yield line, stripped, len(stripped) if length <= LINE_LIMIT_BYTES else length


HEAD_BYTES = 1 << 16


class RowReader:
    """Iterate over the rows of `files`. `bytes_done` and `file_warnings` (per file) grow meanwhile.

    No packed file may unpack to more than `max_unpacked` bytes: DataError.
    """

    def __init__(self, files: Sequence[DataFile], max_unpacked: int = MAX_UNPACKED) -> None:
        self.files, self.max_unpacked = files, max_unpacked
        self.bytes_total = sum(file.size_bytes for file in files)
        self.bytes_done = 0
        self.file_warnings: dict[int, Counter[str]] = {index: Counter() for index in range(len(files))}

    def __iter__(self) -> Iterator[RawRow]:
        before = 0
        for index, file in enumerate(self.files):
            yield from self._rows_of(index, file, before)
            before += file.size_bytes
            self.bytes_done = before

    def _rows_of(self, index: int, file: DataFile, before: int) -> Iterator[RawRow]:
        if file.format == "hub":
            yield from hub_rows(index, file)
        elif file.format in ("parquet", "arrow"):
            rows_of = parquet_rows if file.format == "parquet" else arrow_rows
            yield from rows_of(
                index, file, self.max_unpacked, lambda share: self._at(before + int(share * file.size_bytes))
            )
        else:
            yield from self._text_rows(index, file, before)

    def _at(self, bytes_done: int) -> None:
        self.bytes_done = bytes_done

    def _text_rows(self, index: int, file: DataFile, before: int) -> Iterator[RawRow]:
        with reading(file):
            disk = ByteStream(file, self.max_unpacked)
            try:
                stream = Utf8Stream(disk, self.file_warnings[index], file.encoding)
                head = _first_text(stream)
                rewound: Readable = _Rewound(stream, head)
                if b"\r" in head[:-1] and b"\n" not in head:
                    self.file_warnings[index]["CR line ends"] += 1
                    rewound, head = _OfOldMacs(rewound), head.replace(b"\r", b"\n")
                for row in self._by_format(index, file, rewound, head):
                    self.bytes_done = before + disk.bytes_done
                    yield row
            finally:
                disk.close()

    def _by_format(self, index: int, file: DataFile, stream: Readable, head: bytes) -> Iterator[RawRow]:
        _require_rows(file, head)
        if file.format == "csv":
            return csv_rows(stream, index, file, self.file_warnings[index])
        start = head.lstrip()
        if start.startswith(b"[") and (file.format == "json" or _opens_an_array(start)):
            return array_rows(stream, index, self.file_warnings[index])
        if file.format == "json" and start.startswith(b"{") and _is_one_object(start):
            raise _one_object(stream, file)
        return jsonl_rows(stream, index, self.file_warnings[index])


def raw_rows(*named: str) -> list[dict[str, Any]]:
    """Return the fields of every readable row of files, folders or hub datasets, before they have a shape."""
    return [dict(row.fields) for row in RowReader(find_files(named)) if row.fields is not None]


def _require_rows(file: DataFile, head: bytes) -> None:
    """Raise DataError if a text is none of the kind that its name says, once it is unpacked and in UTF-8."""
    kind, _ = binary_kind(head)
    if kind:
        raise DataError(f"holds {kind}", where=file.name, fix="unpack it, and name the file that was in it")
    text = head.decode("utf-8", "replace")
    if found := text_kind(text):
        raise DataError(found[0], where=file.name, fix=found[1])
    if not file.compression and (found := written_otherwise(text, file.name, is_csv=file.format == "csv")):
        raise DataError(found[0], where=file.name, fix=found[1])
    form = text_format(text)
    if form and form != ("csv" if file.format == "csv" else "json"):
        name = _renamed(file, ".jsonl" if form == "json" else ".csv")
        what = f"is {form.upper()} by its first lines, whatever its name says"
        raise DataError(what, where=file.name, fix=f"mv '{file.name}' '{name}', and name that")
    if file.format == "jsonl" and not file.compression and objects_one_below_another(text):
        raise DataError("each row spans several lines", where=file.name, fix=on_one_line_each(file.name))


def _renamed(file: DataFile, suffix: str) -> Path:
    packed = file.path.suffix if file.compression else ""
    path = file.path.with_suffix("") if packed else file.path
    return path.with_suffix(suffix + packed)


class _Rewound:
    """A stream that begins again with `head`, which has been read."""

    def __init__(self, stream: Utf8Stream, head: bytes) -> None:
        self.stream, self.head = stream, head

    def read(self, size: int) -> bytes:
        """Return `head`, then the stream."""
        head, self.head = self.head, b""
        return head or self.stream.read(size)


class _OfOldMacs:
    """A stream with LF in place of lone CR, which Excel's "CSV (Macintosh)" writes."""

    def __init__(self, stream: Readable) -> None:
        self.stream = stream

    def read(self, size: int) -> bytes:
        """Return the next bytes."""
        return self.stream.read(size).replace(b"\r", b"\n")


def _first_text(stream: Utf8Stream) -> bytes:
    """Return the first bytes with the blanks before them, enough to recognise the kind of file."""
    head, shown = bytearray(), 0
    while shown < HEAD_BYTES and len(head) < LINE_LIMIT_BYTES and (block := stream.read(HEAD_BYTES)):
        head += block
        shown += len(block) if shown else len(block.lstrip())
    return bytes(head)


def _one_object(stream: Readable, file: DataFile) -> DataError:
    """Return the error for a file of one object, with the way to take its rows out."""
    text = b""
    while len(text) < LINE_LIMIT_BYTES and (block := stream.read(HEAD_BYTES)):
        text += block
    parsed = parse_row(text)
    found = None if isinstance(parsed, Reject) else container(parsed, file.name)
    if found:
        return DataError(found[0], where=file.name, fix=found[1])
    pretty = "if its objects stand one below the other, name it .jsonl and write each on one line"
    return DataError(
        "holds one JSON object, not a list of rows", where=file.name, fix=f"save the list itself; {pretty}"
    )


def _is_one_object(start: bytes) -> bool:
    """Return True if an object spans several lines: then the file is that object, not one row per line."""
    first, newline, _ = start.partition(b"\n")
    parsed = parse_row(first)
    return bool(newline) and isinstance(parsed, Reject) and parsed.reason == CUT_OFF


def _opens_an_array(start: bytes) -> bool:
    """Return True if a .jsonl file is an array over several lines, not a line that happens to be an array."""
    first, newline, _ = start.partition(b"\n")
    return start[1:].lstrip()[:1] in (b"{", b"") and not (newline and first.rstrip().endswith(b"]"))


def jsonl_rows(stream: Readable, index: int, file_warnings: Counter[str]) -> Iterator[RawRow]:
    """Yield one row per line. Blank lines are counted and skipped."""
    for number, raw, length in lines(stream):
        if raw.endswith(b"\r"):
            raw = raw[:-1]
            file_warnings["CRLF line end"] += 1
        if raw.startswith(codecs.BOM_UTF8):  # a file that was appended brings its own
            raw = raw.removeprefix(codecs.BOM_UTF8)
            file_warnings["byte order mark"] += 1
        if not raw.strip():
            file_warnings["blank line"] += 1
            continue
        yield _row(index, number, raw, length)


def array_rows(stream: Readable, index: int, file_warnings: Counter[str]) -> Iterator[RawRow]:
    """Yield one row per element of a top-level array."""
    elements = Elements(stream)
    broken = False
    for number, raw, length in elements:
        row = _row(index, number, raw, length)
        broken = row.reject is not None
        yield row
    if elements.strays:
        file_warnings["needless comma"] += elements.strays
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
