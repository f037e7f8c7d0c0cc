"""own_files: open, write and remove a run's own files, and never through a link that somebody planted.

A run folder may come from somebody else. A link in it would lead a writer out of the folder, and a pipe would stop a
reader for ever. `refuse_planted` names one when a command opens the run; the functions below hold while it works.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from lorafit.errors import RunDirError

# O_NONBLOCK: the open of a pipe must not wait for its other end
_PLAIN = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
_BINARY = getattr(os, "O_BINARY", 0)
KINDS = (
    (stat.S_ISLNK, "a symbolic link"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)
CHANGED_IN_PLACE = frozenset((".lock", "log.txt", "events.jsonl", "timings.jsonl", "metrics.jsonl"))
"""Files of a run that are written in place. A second name of one would change with it; all others are replaced."""
DEEP, LISTED = ("adapter", "model", "checkpoints"), ("exports",)
"""Folders of a run: those that are looked through, and those of which only the entries are."""


def open_own(path: Path, flags: int) -> int:
    """Open a plain file with one name, and return its descriptor.

    `flags` are those of os.open, without O_TRUNC. Raises OSError for a link, a pipe, a socket, a device, a folder, and
    for a file with a second name.
    """
    assert not flags & os.O_TRUNC, "the content would be lost before it is known whose it is"
    try:
        descriptor = os.open(path, flags | _PLAIN | _BINARY, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP and path.is_symlink():
            raise OSError(errno.ELOOP, "it is a symbolic link", str(path)) from error
        raise
    try:
        _require_plain(os.fstat(descriptor), path)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def read_own(path: Path) -> bytes:
    """Return the content of a run's file. Raises OSError as `open_own` does."""
    with os.fdopen(open_own(path, os.O_RDONLY), "rb") as stream:
        return stream.read()


def append_own(path: Path, text: str) -> None:
    """Append `text` to a run's file in one write. Raises OSError as `open_own` does."""
    with os.fdopen(open_own(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT), "ab", buffering=0) as stream:
        stream.write(text.encode("utf-8", "backslashreplace"))


def new_own(path: Path) -> int:
    """Create the file at `path` and return its descriptor.

    A file or link of the name is removed first, not what it leads to. Raises OSError.
    """
    require_replaceable(path)
    with suppress(FileNotFoundError):
        path.unlink()
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _PLAIN | _BINARY, 0o666)


def new_own_folder(path: Path) -> None:
    """Create the empty folder `path`, replacing anything of that name. Raises OSError."""
    remove_own(path)
    path.mkdir()


def remove_own(path: Path) -> None:
    """Remove a file, a folder or a link with the name `path`; nothing that a link leads to is touched."""
    try:
        is_folder = stat.S_ISDIR(path.lstat().st_mode)
    except OSError:
        return
    if is_folder:
        shutil.rmtree(path, ignore_errors=True)
        return
    with suppress(OSError):
        path.unlink()


def require_replaceable(path: Path) -> None:
    """Raise OSError unless `path` is free, a file or a link. Root could rename a file over a device."""
    with suppress(FileNotFoundError):
        mode = path.lstat().st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISLNK(mode)):
            raise OSError(errno.EINVAL, f"it is {_kind_of(mode)}", str(path))


def require_folder(path: Path) -> None:
    """Raise OSError unless `path` is a folder itself, and no link to one."""
    if not stat.S_ISDIR(path.lstat().st_mode):
        raise OSError(errno.ENOTDIR, "it is no folder", str(path))


def refuse_planted(folder: Path, *, writes: bool = False) -> None:
    """Raise RunDirError if the run in `folder` holds a link, a pipe, a socket or a device.

    With `writes` a second name of a file that is changed in place is refused too. The folder itself may be a link, and
    folders that lorafit does not know are not looked into.
    """
    try:
        for entry in _entries(folder):
            status = entry.stat(follow_symlinks=False)
            for is_kind, kind in KINDS:
                if is_kind(status.st_mode):
                    raise _planted(Path(entry.path), f"is {kind}, which a run never holds")
            if writes and entry.name in CHANGED_IN_PLACE and stat.S_ISREG(status.st_mode) and status.st_nlink > 1:
                raise _planted(Path(entry.path), "has a second name (a hard link), which would be changed with it")
    except (FileNotFoundError, NotADirectoryError):
        return  # there is no run, or it is changing: opening it says so
    except OSError as error:
        reason = error.strerror or str(error)
        raise RunDirError(f"the folder cannot be read ({reason})", where=str(folder), fix="check its rights") from error


def _entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    with os.scandir(folder) as found:
        top = list(found)
    yield from top
    for entry in top:
        if entry.name in (*DEEP, *LISTED) and entry.is_dir(follow_symlinks=False):
            yield from _below(Path(entry.path), is_deep=entry.name in DEEP)


def _below(folder: Path, *, is_deep: bool) -> Iterator[os.DirEntry[str]]:
    with os.scandir(folder) as found:
        inner = list(found)
    for entry in inner:
        yield entry
        if is_deep and entry.is_dir(follow_symlinks=False):
            yield from _below(Path(entry.path), is_deep=True)


def _planted(path: Path, what: str) -> RunDirError:
    return RunDirError(
        f"the entry {what}, so the run is not opened", where=str(path), fix="remove it, or copy the run without it"
    )


def _kind_of(mode: int) -> str:
    return next((kind for is_kind, kind in KINDS if is_kind(mode)), "a folder")


def _require_plain(status: os.stat_result, path: Path) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, f"it is {_kind_of(status.st_mode)}", str(path))
    if status.st_nlink > 1:
        raise OSError(errno.EMLINK, "it has a second name, a hard link", str(path))
