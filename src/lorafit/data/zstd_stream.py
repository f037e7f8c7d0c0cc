"""ZstdStream: zstd frames one after another, and an error where the last one never ends.

`zstandard`'s own stream reader takes a stream that was cut between two blocks for a whole one: half of the rows would
be missing in silence.
"""

from __future__ import annotations

from typing import IO, Any

import zstandard

PACKED_BLOCK = 1 << 14  # small, so that what one block unpacks to stays small too


class ZstdStream:
    """Reads decompressed bytes from `disk`. Raises EOFError at the end of a stream that was cut off."""

    def __init__(self, disk: IO[bytes]) -> None:
        self.disk = disk
        self.frame: Any = None  # the open frame's decompressor
        self.packed = self.plain = b""

    def read(self, size: int) -> bytes:
        """At most `size` bytes; empty at the end."""
        while not self.plain:
            self.packed = self.packed or self.disk.read(PACKED_BLOCK)
            if not self.packed:
                if self.frame is not None:
                    raise EOFError("its last frame never ends")
                return b""
            self.frame = self.frame or zstandard.ZstdDecompressor().decompressobj()
            self.plain = self.frame.decompress(self.packed)
            self.packed = self.frame.unused_data if self.frame.eof else b""
            if self.frame.eof:
                self.frame = None
        block, self.plain = self.plain[:size], self.plain[size:]
        return block
