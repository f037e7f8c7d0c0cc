"""NewFiles: files that a command writes for the user. Each is new, and no input or foreign file is replaced."""

from __future__ import annotations

import os
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

from lorafit.errors import LorafitError


class NewFiles:
    """Write files to `places`: all of them if the block ends without an error, none otherwise.

        with NewFiles([out, rejected], inputs=files, error=DataError) as new:
            new.streams[0].write(...)

    Each is written under a name of its own beside its place, and put there without replacing anything. Raises `error`
    when a place is one of `inputs`, is taken (a dangling link counts), or cannot be written.
    """

    def __init__(self, places: Sequence[Path], *, inputs: Sequence[Path] = (), error: type[LorafitError]) -> None:
        self.places, self.error = list(places), error
        for place in places:
            _refuse_taken(place, inputs, error)
        self.staged: list[Path] = []
        self.streams: list[IO[bytes]] = []
        self._left_out: set[Path] = set()

    def leave_out(self, place: Path) -> None:
        """Make no file at `place` after all."""
        self._left_out.add(place)

    def __enter__(self) -> NewFiles:
        try:
            for place in self.places:
                staged = place.with_name(f".lorafit-{uuid.uuid4().hex}.partial")
                self.streams.append(staged.open("xb"))
                self.staged.append(staged)
        except OSError as problem:
            self._clear()
            raise self._unwritable(problem) from problem
        return self

    def __exit__(self, kind: type[BaseException] | None, problem: BaseException | None, trace: object) -> None:
        published: list[Path] = []
        try:
            if kind is None:
                for stream in self.streams:
                    stream.close()
                for staged, place in zip(self.staged, self.places):
                    if place not in self._left_out:
                        _put(staged, place)
                        published.append(place)
        except OSError as refused:
            for place in published:
                with suppress(OSError):
                    place.unlink()
            raise self._unwritable(refused) from refused
        finally:
            self._clear()
        if isinstance(problem, OSError):
            raise self._unwritable(problem) from problem

    def _clear(self) -> None:
        """Remove what was written under the staged names: this object made each of them."""
        for stream in self.streams:
            with suppress(OSError):
                stream.close()
        for staged in self.staged:
            with suppress(OSError):
                staged.unlink()

    def _unwritable(self, problem: OSError) -> LorafitError:
        if isinstance(problem, FileExistsError):
            return _taken(Path(problem.filename2 or problem.filename or self.places[0]), self.error)
        reason = problem.strerror or str(problem)
        return self.error(
            f"cannot be written ({reason})", where=str(self.places[0]), fix="check the folder and the disk"
        )


def _refuse_taken(place: Path, inputs: Sequence[Path], error: type[LorafitError]) -> None:
    try:
        if any(_is_same(place, other) for other in inputs):
            fix = "name another file to write to"
            raise error("is an input of this command, and it would be written to", where=str(place), fix=fix)
        if os.path.lexists(place):
            raise _taken(place, error)
    except OSError as problem:
        raise error(f"cannot be written ({problem.strerror})", where=str(place), fix="check the path") from problem


def _taken(place: Path, error: type[LorafitError]) -> LorafitError:
    return error("is there already", where=str(place), fix="name another file to write to, or move this one away")


def _is_same(one: Path, other: Path) -> bool:
    with suppress(FileNotFoundError):
        return one.samefile(other)
    return one.absolute() == other.absolute()


def _put(staged: Path, place: Path) -> None:
    """Give `staged` the name `place`. Raises FileExistsError if the place is taken."""
    try:
        os.link(staged, place)  # the one call that names a file and never replaces another
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        place.open("xb").close()
        try:
            staged.replace(place)
        except OSError:
            place.unlink()
            raise
