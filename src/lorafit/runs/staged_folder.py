"""staged_folder: a folder that appears whole, or not at all."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from lorafit.errors import RunDirError


@contextmanager
def staged_folder(folder: Path, *, replace: bool = False) -> Iterator[Path]:
    """A fresh sibling of `folder` to write into; when the block ends well it is synced and renamed to `folder`.

    When the block raises, nothing is left behind. An existing `folder` is replaced with `replace` and is otherwise
    a RunDirError, as are a full disk and a place that cannot be written.
    """
    if folder.exists() and not replace:
        raise RunDirError(
            "something is already there", where=str(folder), fix="remove it, or choose another with --out"
        )
    staged = folder.with_name(f".{folder.name}.staged")  # one left by a killed process is replaced
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir()
        yield staged
        _sync(staged)
        _publish(staged, folder)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RunDirError(f"it cannot be written ({reason})", where=str(folder), fix="check the disk") from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def follow_umask(folder: Path) -> None:
    """Give every file in `folder` the mode of a file that is opened anew here; safetensors writes its own as 0600."""
    probe = folder / ".mode"
    probe.touch()
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)


def _sync(folder: Path) -> None:
    follow_umask(folder)
    for path in [*(path for path in folder.rglob("*") if path.is_file()), folder]:
        sync(path)


def sync(path: Path) -> None:
    """Wait until the file or folder at `path` is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _publish(staged: Path, folder: Path) -> None:
    # a folder cannot be renamed over a full one, so the old one steps aside first
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    staged.rename(folder)
    sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)
