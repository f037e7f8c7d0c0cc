"""RunLock: one process at a time writes to a run directory. No torch."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self

from lorafit.errors import RunDirError

LOCK = ".lock"
MAX_LOCK_BYTES = 4096
NO_LOCKS_HERE = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
"""What file systems without locks answer; the owner's process is then looked for by its id."""


@dataclass(frozen=True, slots=True)
class Owner:
    """Who holds a run: the process, its start in clock ticks since boot, the machine and its boot, and since when."""

    pid: int
    started: int
    host: str
    boot: str
    since: str

    @classmethod
    def here(cls) -> Owner:
        """This process."""
        now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        return cls(os.getpid(), _start_ticks(os.getpid()), socket.gethostname(), _boot_id(), now)

    @classmethod
    def read(cls, text: str) -> Owner | None:
        """The owner a lock file names; None for an empty or damaged one, which nobody holds."""
        try:
            owner = cls(**json.loads(text))
        except (ValueError, TypeError):
            return None
        return owner if isinstance(owner.pid, int) and isinstance(owner.host, str) else None

    def runs_here(self) -> bool:
        """True when this very process is still there: same boot, same id, same start."""
        return self.boot == _boot_id() and _start_ticks(self.pid) == self.started != 0

    def may_run_elsewhere(self) -> bool:
        """True when it was another machine's, of which nothing can be known from here."""
        return self.boot != _boot_id() and self.host != socket.gethostname()


class RunLock:
    """Holds `folder`/.lock within a `with` block.

    The kernel's lock decides where the file system has one, so a killed owner holds nothing, whatever the file says.
    The file names the owner for the message, and decides between machines that share a disk.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOCK
        self.descriptor: int | None = None

    def __enter__(self) -> Self:
        """Take it. Raises RunDirError, naming the owner, when another process has it."""
        while True:
            self.descriptor = self._open()
            owner = Owner.read(os.pread(self.descriptor, MAX_LOCK_BYTES, 0).decode("utf-8", "replace"))
            if not self._take() or (owner is not None and owner.may_run_elsewhere()):
                self._close()
                raise _taken(self.path, owner)
            if self._is_current():
                break
            self._close()  # its owner removed it between our opening and locking it
        self._sign()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.descriptor is not None:
            if self._is_current():
                self.path.unlink()
            self._close()

    @property
    def is_held(self) -> bool:
        """False where its file is gone, or another's."""
        return self.descriptor is not None and self._is_current()

    def hold(self) -> None:
        """Take it once more where its file was removed. RunDirError when another process has it by now."""
        if self.descriptor is not None and not self._is_current():
            self._close()
        if self.descriptor is None:
            self.__enter__()

    def _open(self) -> int:
        try:
            return os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise RunDirError(
                f"cannot be locked ({error.strerror})", where=str(self.path), fix="check the folder"
            ) from error

    def _sign(self) -> None:
        """Name this process in the file. RunDirError, and no file, when the disk is full."""
        assert self.descriptor is not None
        try:
            os.ftruncate(self.descriptor, 0)
            os.pwrite(self.descriptor, json.dumps(asdict(Owner.here())).encode(), 0)
        except OSError as error:
            self.__exit__(None, None, None)
            what = f"the run's lock cannot be written ({error.strerror})"
            raise RunDirError(what, where=str(self.path), fix="free some space") from error

    def _take(self) -> bool:
        assert self.descriptor is not None
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in NO_LOCKS_HERE:
                return False
            owner = Owner.read(os.pread(self.descriptor, MAX_LOCK_BYTES, 0).decode("utf-8", "replace"))
            return owner is None or not owner.runs_here()
        return True

    def _is_current(self) -> bool:
        assert self.descriptor is not None
        try:
            return os.path.samestat(os.fstat(self.descriptor), self.path.stat())
        except FileNotFoundError:
            return False

    def _close(self) -> None:
        assert self.descriptor is not None
        os.close(self.descriptor)
        self.descriptor = None


def _taken(path: Path, owner: Owner | None) -> RunDirError:
    if owner is None:
        return RunDirError("another process is training this run", where=str(path.parent), fix="let it finish")
    what = f"process {owner.pid} on {owner.host} is training this run (since {owner.since})"
    fix = "let it finish, or stop it"
    if owner.may_run_elsewhere():
        fix += f"; if that machine is gone, remove {path}"
    return RunDirError(what, where=str(path.parent), fix=fix)


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _start_ticks(pid: int) -> int:
    """When the process began, in clock ticks since boot; 0 when there is none, or no /proc."""
    try:
        line = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return 0
    return int(line.rpartition(")")[2].split()[19])  # the 22nd field; the second may hold blanks
