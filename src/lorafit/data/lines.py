"""Physical lines of a byte stream, bounded in memory, with what was read past counted."""

from __future__ import annotations

import codecs
from collections import Counter
from collections.abc import Iterator
from typing import Protocol

BLOCK_BYTES = 1 << 20
LINE_LIMIT_BYTES = 16 << 20
WIDE = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
    (b'{\0"\0', "utf-16-le"),
    (b"[\0{\0", "utf-16-le"),
    (b'\0{\0"', "utf-16-be"),
    (b"\0[\0{", "utf-16-be"),
)


class Readable(Protocol):
    """What a byte stream must offer."""

    def read(self, size: int) -> bytes:
        """At most `size` bytes; empty at the end."""


class Utf8Stream:
    """The bytes of `inner` as UTF-8: a BOM is dropped and UTF-16 or UTF-32 converted, each noted in `oddities`."""

    def __init__(self, inner: Readable, oddities: Counter[str]) -> None:
        self.inner = inner
        self.head = _at_least(inner, 4)
        self.decoder: codecs.IncrementalDecoder | None = None
        encoding = next((name for mark, name in WIDE if self.head.startswith(mark)), "")
        if encoding:
            oddities[f"{encoding[:6].upper()} text"] += 1
            self.decoder = codecs.getincrementaldecoder(encoding)("surrogatepass" if "16" in encoding else "replace")
        elif self.head.startswith(codecs.BOM_UTF8):
            oddities["byte order mark"] += 1
            self.head = self.head[3:]

    def read(self, size: int) -> bytes:
        """About `size` bytes of UTF-8; empty at the end. Half surrogates come out as the bytes UTF-8 forbids."""
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


def _at_least(stream: Readable, size: int) -> bytes:
    head = b""
    while len(head) < size and (block := stream.read(size - len(head))):
        head += block
    return head


def lines(stream: Readable) -> Iterator[tuple[int, bytes, int]]:
    r"""(number from 1, bytes without the `\n`, full length in bytes) of every line, the last one too.

    A line longer than `LINE_LIMIT_BYTES` comes cut to that, with its full length: memory stays bounded
    whatever the file holds. A file that ends in `\n` has no empty line after it.
    """
    number, tail, dropped = 1, b"", 0
    while block := stream.read(BLOCK_BYTES):
        pieces = (tail + block).split(b"\n") if tail else block.split(b"\n")
        tail = pieces.pop()
        for piece in pieces:
            yield number, piece[:LINE_LIMIT_BYTES], len(piece) + dropped
            number, dropped = number + 1, 0
        if len(tail) > LINE_LIMIT_BYTES:
            dropped += len(tail) - LINE_LIMIT_BYTES
            tail = tail[:LINE_LIMIT_BYTES]
    if tail:
        yield number, tail, len(tail) + dropped
