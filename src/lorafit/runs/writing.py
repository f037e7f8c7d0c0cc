"""Writing: atomic folders, and a lock for one writing process a run."""

from __future__ import annotations

import json
import os
import socket
import stat
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from lorafit.errors import RunDirError
from lorafit.runs.own_files import new_own, new_own_folder, open_own, remove_own

LOCK, OWNER = ".lock", ".lock.json"


@contextmanager
def staged_folder(folder: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield a new sibling of `folder` to write into.

    At the end the sibling is synced and renamed to `folder`. When the block raises, it is removed. With `replace` an
    existing `folder` is replaced, and a link in its place too. Raises RunDirError for an existing folder otherwise, for
    a full disk, and for a place that is not writable.
    """
    if os.path.lexists(folder) and not replace:
        raise RunDirError("the folder already exists", where=str(folder), fix="remove it, or choose another with --out")
    staged = folder.with_name(f".{folder.name}.staged")  # replaces one that a killed process has left
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        new_own_folder(staged)
        yield staged
        _sync(staged)
        _publish(staged, folder)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        what = f"the folder cannot be written ({reason})"
        raise RunDirError(what, where=str(folder), fix="check the disk") from error
    finally:
        remove_own(staged)


def follow_umask(folder: Path) -> None:
    """Give every file in `folder` the mode of a newly created file.

    safetensors writes its files with mode 0600.
    """
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
    # rename cannot replace a folder that is not empty, so the old one is renamed first
    old = folder.with_name(f".{folder.name}.old")
    remove_own(old)
    replaces = os.path.lexists(folder)
    if replaces:
        folder.rename(old)
    try:
        staged.rename(folder)
        sync(folder.parent)
    except OSError:
        with suppress(OSError):  # the same command can be repeated: what was there is there again
            if not os.path.lexists(staged):
                folder.rename(staged)
            if replaces:
                old.rename(folder)
        raise
    remove_own(old)


def _boot_id() -> str:
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return ""


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


@dataclass(frozen=True, slots=True)
class Owner:
    """Describe the process that holds a run's lock.

    Attributes:
        pid: Its process id.
        host: The machine's name.
        boot: The machine's boot, the same in all of its containers.
        since: When the process took the lock.
        command: The process's command line.
    """

    pid: int = field(default_factory=os.getpid)
    host: str = field(default_factory=socket.gethostname)
    boot: str = field(default_factory=_boot_id)
    since: str = field(default_factory=_now)
    command: str = field(default_factory=lambda: " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])[:200])

    @classmethod
    def read(cls, path: Path) -> Owner | None:
        """Return the owner in the note at `path`; None for a missing or damaged note."""
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None

    @property
    def is_elsewhere(self) -> bool:
        """True when the owner runs on another machine, whose processes are not visible."""
        return self.boot != _boot_id() and self.host != socket.gethostname()


class RunLock:
    """Hold `folder`/.lock within a `with` block.

    The kernel releases the lock of a killed process. The note beside it names the owner for the error message, and
    detects owners on other machines that share the disk.
    """

    def __init__(self, folder: Path) -> None:
        self.path, self.note = folder / LOCK, folder / OWNER
        self._lock = FileLock(self.path, timeout=0, thread_local=False)
        self._inode: int | None = None

    def __enter__(self) -> Self:
        """Acquire the lock. Raises RunDirError with the owner's name when another process holds it."""
        taken = self._acquire()
        owner = Owner.read(self.note)
        if not taken or (owner is not None and owner.is_elsewhere):
            self._lock.release()
            raise _taken(self.path, owner)
        try:
            self._inode = self.path.lstat().st_ino
            with os.fdopen(new_own(self.note), "w", encoding="utf-8") as note:
                note.write(json.dumps(asdict(Owner())))
        except OSError as error:
            self.__exit__(None, None, None)
            what = f"the run's lock cannot be written ({error.strerror})"
            raise RunDirError(what, where=str(self.path), fix="check the disk") from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.is_held:
            self.note.unlink(missing_ok=True)
            self.path.unlink(missing_ok=True)
        self._lock.release()
        self._inode = None

    @property
    def is_held(self) -> bool:
        """False when the lock's file is missing or belongs to another process."""
        with suppress(OSError):
            return self._inode is not None and self.path.lstat().st_ino == self._inode
        return False

    def hold(self) -> None:
        """Acquire the lock again when its file was removed. Raises RunDirError when another process holds it."""
        if not self.is_held:
            self._lock.release()
            self._inode = None
            self.__enter__()

    def _acquire(self) -> bool:
        try:
            self.path.parent.stat()  # filelock would create a missing folder
            with suppress(FileNotFoundError):  # filelock empties whatever has the name
                os.close(open_own(self.path, os.O_RDWR))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # on a disk without flock the file's presence is the lock
                self._lock.acquire()
        except Timeout:
            return False
        except (OSError, NotImplementedError) as error:
            reason = getattr(error, "strerror", None) or error
            fix = "check the folder, or choose an --out on a disk with file locks"
            raise RunDirError(f"the run cannot be locked ({reason})", where=str(self.path), fix=fix) from error
        return True


def _taken(path: Path, owner: Owner | None) -> RunDirError:
    if owner is None:
        return RunDirError("another process is training this run", where=str(path.parent), fix="let it finish")
    what = f"process {owner.pid} on {owner.host} is training this run (since {owner.since}: {owner.command})"
    fix = "let it finish, or stop it"
    if owner.is_elsewhere:
        fix += f"; if that machine no longer exists, remove {path.with_name(OWNER)}"
    return RunDirError(what, where=str(path.parent), fix=fix)
