"""Files: one data file as decompressed UTF-8 bytes and as lines, in bounded memory."""

from __future__ import annotations

import codecs
import gzip
import io
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import zstandard

from lorafit.config import one_line
from lorafit.errors import DataError
from lorafit.runs import file_hash

BLOCK_BYTES = 1 << 20
LINE_LIMIT_BYTES = 16 << 20
WIDE = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
UNMARKED = ((b"x\0x\0", "utf-16-le"), (b"\0x\0x", "utf-16-be"), (b"x\0\0\0", "utf-32-le"), (b"\0\0\0x", "utf-32-be"))
"""Where the zero bytes of Western text stand without a byte order mark; x is any other byte."""


class Readable(Protocol):
    """Protocol of a byte stream."""

    def read(self, size: int) -> bytes:
        """Return at most `size` bytes; empty at the end."""


class Utf8Stream:
    """The bytes of `inner` as UTF-8. A BOM is dropped and UTF-16 or UTF-32 converted, each noted in `file_warnings`."""

    def __init__(self, inner: Readable, file_warnings: Counter[str], named: str = "") -> None:
        self.inner = inner
        self.head = _at_least(inner, 4)
        self.decoder: codecs.IncrementalDecoder | None = None
        encoding = next((name for mark, name in WIDE if self.head.startswith(mark)), "") or _unmarked(self.head)
        if named and not encoding and not self.head.startswith(codecs.BOM_UTF8):
            file_warnings[f"{named} text"] += 1
            self.decoder = codecs.getincrementaldecoder(named)("replace")
        elif encoding:
            file_warnings[f"{encoding[:6].upper()} text"] += 1
            self.decoder = codecs.getincrementaldecoder(encoding)("surrogatepass" if "16" in encoding else "replace")
        elif self.head.startswith(codecs.BOM_UTF8):
            file_warnings["byte order mark"] += 1
            self.head = self.head[3:]

    def read(self, size: int) -> bytes:
        """Return about `size` bytes of UTF-8; empty at the end. Half surrogates become bytes that UTF-8 forbids."""
        while True:
            block = self.head or self.inner.read(size)
            self.head = b""
            if self.decoder is None:
                return block
            text = self._decoded(block)
            if text or not block:
                return text.encode("utf-8", "surrogatepass")

    def _decoded(self, block: bytes) -> str:
        assert self.decoder is not None
        try:
            return self.decoder.decode(block, final=not block)
        except UnicodeDecodeError:
            # a cut-off last character: show it as the replacement character, which no row may hold unseen
            self.decoder.reset()
            return "�"


def _unmarked(head: bytes) -> str:
    zeros = bytes(byte and ord("x") for byte in head)
    return next((name for pattern, name in UNMARKED if zeros == pattern), "")


def _at_least(stream: Readable, size: int) -> bytes:
    head = b""
    while len(head) < size and (block := stream.read(size - len(head))):
        head += block
    return head


def lines(stream: Readable) -> Iterator[tuple[int, bytes, int]]:
    r"""Yield (number from 1, bytes without the `\n`, full length in bytes) of every line, the last one too.

    A line longer than `LINE_LIMIT_BYTES` comes cut to that, with its full length: memory stays bounded
    whatever the file holds. A file that ends in `\n` has no empty line after it.
    """
    number, tail, length = 1, bytearray(), 0
    while block := stream.read(BLOCK_BYTES):
        pieces = block.split(b"\n")
        rest = pieces.pop()
        if pieces and length:
            first = pieces[0]
            pieces[0] = bytes(tail + first[: LINE_LIMIT_BYTES - len(tail)])
            yield number, pieces[0], length + len(first)
            del pieces[0]
            number, tail, length = number + 1, bytearray(), 0
        for piece in pieces:
            yield number, piece[:LINE_LIMIT_BYTES], len(piece)
            number += 1
        tail += rest[: LINE_LIMIT_BYTES - len(tail)]
        length += len(rest)
    if length:
        yield number, bytes(tail), length


MAX_UNPACKED = 64 << 30
"""More than any instruction data take. A ratio would be no judge: equal rows pack a thousandfold."""
PACKED_BLOCK = 1 << 10
"""Bytes of zstd that are unpacked at once: they are 32 MiB at most, since four bytes (a block of one repeated byte) can
stand for 128 KiB."""


@dataclass(frozen=True, slots=True)
class DataFile:
    """One file to read: `path`, the `name` used in places, `format` and `compression`.

    `hub_id` is set instead of a path for a dataset of the hub. `held_out` marks files that `--holdout` names.
    `encoding` is how the user says that text is written. `split` is train, validation or test, by the file's name.
    """

    path: Path
    name: str
    format: str
    compression: str = ""
    hub_id: str = ""
    held_out: bool = False
    encoding: str = ""
    split: str = ""

    @property
    def size_bytes(self) -> int:
        """Return the bytes on disk, compressed if the file is."""
        return 0 if self.hub_id else self.path.stat().st_size

    def content_hash(self) -> str:
        """Return the SHA-256 of the bytes on disk, in hex."""
        with reading(self):
            return file_hash(self.path)


@contextmanager
def reading(file: DataFile) -> Iterator[None]:
    """Turn errors of a file on disk into one DataError."""
    try:
        yield
    except (gzip.BadGzipFile, zlib.error, EOFError, zstandard.ZstdError) as error:
        reason = one_line(error)
        raise DataError(
            f"the compressed file is damaged or cut off ({reason})", where=file.name, fix="download or pack it again"
        ) from error
    except OSError as error:
        raise DataError(
            f"cannot be read ({one_line(error)})", where=file.name, fix="check the file and its rights"
        ) from error


class ByteStream:
    """The decompressed bytes of a file, with a count of the bytes read from disk.

    Raises DataError when a compressed file unpacks to more than `max_unpacked` bytes.
    """

    def __init__(self, file: DataFile, max_unpacked: int = MAX_UNPACKED) -> None:
        self.name, self.max_unpacked = file.name, max_unpacked if file.compression else None
        self.bytes_done = self.bytes_out = 0
        self.disk = file.path.open("rb")
        self.plain: IO[bytes] = self.disk
        if file.compression == "gz":
            self.plain = gzip.GzipFile(fileobj=self.disk)  # type: ignore[assignment]
        elif file.compression == "zst":
            self.plain = ZstdStream(self.disk)  # type: ignore[assignment]

    def read(self, size: int) -> bytes:
        """Return at most `size` bytes; empty at the end."""
        block = self.plain.read(size)
        self.bytes_done = self.disk.tell()
        self.bytes_out += len(block)
        if self.max_unpacked is not None and self.bytes_out > self.max_unpacked:
            raise too_much_unpacked(self.name, self.max_unpacked)
        return block

    def close(self) -> None:
        """Close the file."""
        self.disk.close()


def too_much_unpacked(name: str, max_unpacked: int) -> DataError:
    """Return the error for a packed file beyond the cap."""
    return DataError(
        f"unpacks to more than {max_unpacked / 2**30:,.4g} GiB (max_unpacked)",
        where=name,
        fix="if you trust the file, raise the cap with --set max_unpacked=1TiB",
    )


def unpacked(file: DataFile, max_unpacked: int) -> IO[bytes]:
    """Return a seekable file with the decompressed bytes, for formats that are read from their end."""
    if not file.compression:
        return file.path.open("rb")
    spool = tempfile.TemporaryFile()  # noqa: SIM115 - the caller closes it
    stream = ByteStream(file, max_unpacked)
    try:
        while block := stream.read(BLOCK_BYTES):
            spool.write(block)
    except BaseException:
        spool.close()
        raise
    finally:
        stream.close()
    spool.seek(0, io.SEEK_SET)
    return spool


class ZstdStream:
    """Read decompressed bytes from `disk`, zstd frames one after another.

    Raises EOFError for a stream that was cut off. `zstandard`'s own reader takes a stream cut between two blocks for a
    whole one: half of the rows would be missing in silence.
    """

    def __init__(self, disk: IO[bytes]) -> None:
        self.disk = disk
        self.frame: Any = None  # the open frame's decompressor
        self.packed = b""
        self.plain, self.start = b"", 0  # what is unpacked, and how much of it was handed out

    def read(self, size: int) -> bytes:
        """Return `size` bytes; fewer at the end only."""
        parts: list[bytes] = []
        while size and (self.start < len(self.plain) or self._unpack()):
            part = self.plain[self.start : self.start + size]
            parts.append(part)
            self.start += len(part)
            size -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _unpack(self) -> bool:
        """Unpack the next few bytes. Return False at the end."""
        self.packed = self.packed or self.disk.read(PACKED_BLOCK)
        if not self.packed:
            if self.frame is not None:
                raise EOFError("its last frame never ends")
            return False
        self.frame = self.frame or zstandard.ZstdDecompressor().decompressobj()
        self.plain, self.start = self.frame.decompress(self.packed), 0
        self.packed = self.frame.unused_data if self.frame.eof else b""
        if self.frame.eof:
            self.frame = None
        return True
