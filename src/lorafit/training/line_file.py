"""LineFile: lines appended to a file; a disk that refuses them gets them later, and no half line stays."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path


class LineFile:
    """Whatever lies behind the last line written here was written half, or by somebody else: it is cut off.

    A process has one for each file; `begin` replaces the content, `continue_file` keeps what is whole in it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.written_bytes = 0
        self.waiting: list[str] = []

    def begin(self, lines: Iterable[str]) -> None:
        """Start the file anew with `lines`, each ending in a newline."""
        self.written_bytes, self.waiting = 0, list(lines)
        self.flush()

    def discard(self) -> None:
        """Remove the file that an earlier process left; where that is refused, the first line replaces its content."""
        with contextlib.suppress(OSError):
            self.path.unlink(missing_ok=True)

    def continue_file(self) -> None:
        """Go on behind the last whole line that is there."""
        try:
            content = self.path.read_bytes()
        except OSError:
            content = b""
        self.written_bytes = content.rfind(b"\n") + 1

    def append(self, line: str) -> None:
        """Add a line, which ends in a newline; it waits while the disk refuses."""
        self.waiting.append(line)
        self.flush()

    def flush(self) -> bool:
        """Write the lines that wait; False when the disk refuses them still."""
        if not self.is_whole:
            self.continue_file()  # never a gap of zeros in place of what somebody removed
        text = "".join(self.waiting).encode()
        try:
            with self.path.open("r+b" if self.path.exists() else "wb") as file:
                file.truncate(self.written_bytes)
                file.seek(self.written_bytes)
                file.write(text)
        except OSError:
            return False
        self.written_bytes += len(text)
        self.waiting.clear()
        return True

    @property
    def is_whole(self) -> bool:
        """False when what was written here is gone from the disk."""
        try:
            return self.path.stat().st_size >= self.written_bytes
        except OSError:
            return self.written_bytes == 0
