"""The cache: gathered rows by what they depend on, so that a second run answers in seconds."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lorafit.config import RunConfig
from lorafit.data.gather import compares, ignored_codes
from lorafit.data.sources.files import DataFile
from lorafit.data.sources.tables import hub_fingerprint
from lorafit.data.store import Stored
from lorafit.errors import DataError

if TYPE_CHECKING:
    from lorafit.data.template.template import Template

FORMAT = 2
"""Raise it when the same input gives other rows or other facts than before."""
LIMIT_BYTES = 20 << 30
STALE_S = 86_400.0


def key_of(config: RunConfig, template: Template | None, files: Sequence[DataFile]) -> str:
    """SHA-256 of all that the gathered rows depend on: the files' bytes and names, the settings, the template."""
    depends = {
        "format": FORMAT,
        "files": [[file.name, _content(file), file.held_out] for file in files],
        "template": [template.sha256, template.tokenizer.content_hash] if template else None,
        "map": sorted(config.map.items()),
        "long": config.long if template else None,
        "max_tokens": config.max_tokens if template else None,
        "ignored": [*ignored_codes(config), "" if compares(config) else "near copies"],
    }
    return hashlib.sha256(json.dumps(depends).encode()).hexdigest()


def _content(file: DataFile) -> str:
    return hub_fingerprint(file) if file.hub_id else file.content_hash()


def default_folder() -> Path:
    """Where rows are kept when nobody says where: `$LORAFIT_CACHE`, or `lorafit` in the user's cache folder."""
    named = os.environ.get("LORAFIT_CACHE")
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return (Path(named) if named else home / "lorafit") / "data"


def stored(key: str, folder: Path, build: Callable[[Path], None]) -> tuple[Stored, bool]:
    """(the rows under `key`, True when they had been there); `build` fills a new folder with them.

    Raises DataError when the disk is full or the folder cannot be written; nothing half-built is ever found.
    """
    place = folder / key
    if (found := _found(place)) is not None:
        return found, True
    partial = folder / f"{key}.{os.getpid()}.partial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        build(partial)
        _publish(partial, place)
        _make_room(folder, place)
    except OSError as error:
        reason = error.strerror or str(error)
        raise DataError(
            f"cannot keep the rows there ({reason})", where=str(folder), fix="make room, or set LORAFIT_CACHE"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Stored.open(place), False


def _found(place: Path) -> Stored | None:
    """The complete entry at `place`; None when there is none, or one that somebody damaged."""
    try:
        found = Stored.open(place)
    except (OSError, ValueError, KeyError):
        return None
    with contextlib.suppress(OSError):  # in a cache that others own
        os.utime(place)
    return found


def _publish(partial: Path, place: Path) -> None:
    if place.exists() and _found(place) is None:
        shutil.rmtree(place)
    try:
        partial.rename(place)
    except OSError:
        if _found(place) is None:  # otherwise another run has built the same meanwhile
            raise


def _make_room(folder: Path, newest: Path) -> None:
    """Delete what killed runs left behind, and the longest unused entries beyond 20 GiB."""
    now, total = time.time(), 0
    entries = [entry for entry in folder.iterdir() if entry.is_dir()]
    for entry in sorted(entries, key=lambda entry: entry.stat().st_mtime, reverse=True):
        total += sum(file.stat().st_size for file in entry.iterdir())
        stale = entry.name.endswith(".partial") and now - entry.stat().st_mtime > STALE_S
        if stale or (total > LIMIT_BYTES and entry != newest and not entry.name.endswith(".partial")):
            shutil.rmtree(entry, ignore_errors=True)
