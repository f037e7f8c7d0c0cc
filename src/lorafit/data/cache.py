"""Cache: gathered rows under a hash of their inputs, so that a second run answers in seconds."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from lorafit.config import RunConfig
from lorafit.data.gather import compares, ignored_codes
from lorafit.data.sealed_folder import MANIFEST, STAGED, is_whole, kept, touch
from lorafit.data.sources.files import DataFile
from lorafit.data.sources.tables import hub_fingerprint
from lorafit.data.store import Stored
from lorafit.errors import DataError

if TYPE_CHECKING:
    from lorafit.data.template.template import Template

FORMAT = 10
"""Raise it when the same input gives other rows or other facts than before."""
LIMIT_BYTES = 20 << 30
STALE_S = 86_400.0
ENTRY = re.compile(r"[0-9a-f]{64}(\..+\.partial)?")
"""The names that entries have. Nothing else is ever removed: LORAFIT_CACHE may point to a folder of the user's own."""


def key_of(config: RunConfig, template: Template | None, files: Sequence[DataFile]) -> str:
    """Return the SHA-256 of everything that gathered rows depend on: file bytes and names, settings, template."""
    depends = {
        "format": FORMAT,
        "files": [[file.name, _content(file), file.held_out] for file in files],
        "template": [template.sha256, template.tokenizer.content_hash] if template else None,
        "field_map": sorted(config.field_map.items()),
        "encoding": config.encoding,
        "split_answers": config.split_answers,
        "on_long": config.on_long if template else None,
        "max_length": config.max_length if template else None,
        "ignored": [*ignored_codes(config), "" if compares(config) else "near copies"],
    }
    return hashlib.sha256(json.dumps(depends).encode()).hexdigest()


def _content(file: DataFile) -> str:
    return hub_fingerprint(file) if file.hub_id else file.content_hash()


def default_folder() -> Path:
    """Return the cache folder: `$LORAFIT_CACHE`, or `lorafit` in the user's cache folder."""
    named = os.environ.get("LORAFIT_CACHE")
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return (Path(named) if named else home / "lorafit") / "data"


ATTEMPTS = 3
"""How often rows are made again that cannot be read back, or that somebody else removes meanwhile."""


BULK = ("tokens.bin", "text.bin")
"""Nine tenths of an entry's bytes, which nothing reads before the rows are trained on or shown."""


def stored(key: str, folder: Path, build: Callable[[Path], None], *, but_bulk: bool = False) -> tuple[Stored, bool]:
    """Return (the rows under `key`, True if they were cached); `build` fills a new folder with them.

    Raises DataError when the disk is full or the folder cannot be written. An entry is taken only when it is whole to
    the byte (see sealed_folder.py), whoever wrote it: threads, processes and containers may share the folder.
    `but_bulk` leaves `bulk_is_whole` to the caller, for a time when there is other work.
    """
    place = folder / key
    is_usable = partial(is_whole, but=BULK if but_bulk else ())
    try:
        for _ in range(ATTEMPTS):
            found = kept(place, build, is_usable)
            # an entry can vanish or be damaged between the two: others make room in the same folder
            with suppress(FileNotFoundError, EOFError, ValueError, KeyError):
                rows = Stored.open(place)
                touch(place)
                if not found:
                    _make_room(folder, place)
                return rows, found
    except OSError as error:
        raise _unusable(folder, error.strerror or str(error)) from error
    raise _unusable(folder, "they are removed or changed at once")


def bulk_is_whole(rows: Stored) -> bool:
    """Return True if the tokens and the texts of an entry have their sealed hashes."""
    return is_whole(rows.folder, only=BULK)


def confirm(rows: Stored) -> None:
    """Raise DataError if the tokens or the texts of an entry are damaged. The next command makes it again."""
    if not bulk_is_whole(rows):
        with suppress(OSError):
            (rows.folder / MANIFEST).unlink()
        what, fix = "the rows kept there are damaged", "run the command again, and they are made anew"
        raise DataError(what, where=str(rows.folder), fix=fix)


def _unusable(folder: Path, reason: str) -> DataError:
    return DataError(f"cannot keep the rows there ({reason})", where=str(folder), fix="make room, or set LORAFIT_CACHE")


def _make_room(folder: Path, newest: Path) -> None:
    """Delete what killed runs left behind, and the longest unused entries beyond 20 GiB.

    Housekeeping never fails the work: others may remove or rename every entry meanwhile.
    """
    total = 0
    for used, size, entry in sorted(_entries(folder), reverse=True):
        total += size
        is_staged = entry.name.endswith(STAGED)
        is_stale = is_staged and time.time() - used > STALE_S
        if is_stale or (total > LIMIT_BYTES and entry != newest and not is_staged):
            shutil.rmtree(entry, ignore_errors=True)


def _entries(folder: Path) -> Iterator[tuple[float, int, Path]]:
    """Yield (time of last use, bytes, path) of every entry."""
    with suppress(OSError):
        for entry in folder.iterdir():
            if not ENTRY.fullmatch(entry.name):
                continue
            with suppress(OSError):
                inside = [path.stat() for path in entry.rglob("*")]
                used = entry.stat().st_mtime
                # a build that goes on shows in its files, not in the folder around them
                yield max([used, *(one.st_mtime for one in inside)]), sum(one.st_size for one in inside), entry
