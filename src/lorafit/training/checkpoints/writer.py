"""CheckpointWriter: write snapshots on a thread; a full disk does not end the run."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from lorafit.config import RunConfig
from lorafit.errors import LorafitError, RunDirError
from lorafit.runs import Checkpoint, new_own_folder, remove_own, require_folder, sync
from lorafit.runs.checkpoint import checkpoint_folders, folder_name, prune, remove_folder, seal
from lorafit.training.checkpoints.moments import moments_in
from lorafit.training.checkpoints.snapshot import GeneratorsState, Resumable, Snapshot, restore_optimization
from lorafit.training.logging.run_logs import EventLog

FREE_SPACE_MARGIN = 1.1


class CheckpointWriter:
    """Write one snapshot at a time to `folder`/step-N: staged, synced, sealed, renamed, parent synced.

    An error is kept until `wait` or `poll` and becomes an event there, on the caller's thread. A full disk does not end
    the run: a failed checkpoint never touches the last good one, and the next save tries again.

    Attributes:
        is_shared: True if every process writes a part, False if process 0 writes all.
    """

    is_shared = False

    def __init__(self, folder: Path, config: RunConfig, run: str, events: EventLog) -> None:
        self.folder, self.config, self.run, self.events = folder, config, run, events
        self.thread: threading.Thread | None = None
        self.failure: tuple[int, str] | None = None
        self.fault: BaseException | None = None

    def snapshot(self, loop: Resumable, generators_of: Sequence[GeneratorsState] = ()) -> Snapshot:
        """Copy the present state of `loop` to the host; `generators_of` are the random states of all processes."""
        return Snapshot.of(loop, generators_of)

    def restore(self, loop: Resumable, folder: Path) -> dict[str, Any]:
        """Restore optimizer, schedule and loss scale of `loop`; return the state that `resumable` returned."""
        return restore_optimization(loop, folder, moments_in(loop, folder))

    def save(self, snapshot: Snapshot) -> None:
        """Start to write `snapshot`, after the previous one is done."""
        self.wait()
        # daemon: a second Ctrl-C must not wait for a slow disk, and a staged folder is harmless
        self.thread = threading.Thread(target=self._write, args=(snapshot,), name="lorafit-checkpoint", daemon=True)
        self.thread.start()

    def wait(self) -> None:
        """Wait until the snapshot is written, and report its error."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        self.poll()

    def poll(self) -> None:
        """Report an error without waiting. Errors that are not the disk's are raised."""
        failure, self.failure = self.failure, None
        fault, self.fault = self.fault, None
        if fault is not None:
            raise fault
        if failure is not None:
            self._report(*failure)

    def newest(self) -> Path | None:
        """Return the newest checkpoint's folder."""
        return next(reversed(checkpoint_folders(self.folder)), None)

    def _report(self, step: int, reason: str) -> None:
        last = self.newest()
        kept = f"{last.name} is kept" if last else "there is no other yet"
        message = (
            f"the checkpoint of step {step} could not be written ({reason}); {kept}, and the next save tries again"
        )
        self.events.record("checkpoint_failed", step, message)

    def write(self, snapshot: Snapshot) -> None:
        """Write `snapshot` to its folder, and remove old checkpoints."""
        write_checkpoint(snapshot, self.folder, self.run)
        self.prune()

    def prune(self) -> None:
        """Remove old checkpoints."""
        prune(self.folder, keep_last=self.config.keep_last, keep_best=self.config.keep_best)

    def _write(self, snapshot: Snapshot) -> None:
        try:
            self.write(snapshot)
        except LorafitError as error:
            self.failure = (snapshot.step, error.what)
        except (OSError, SafetensorError) as error:
            self.failure = (snapshot.step, f"{getattr(error, 'strerror', None) or error}")
        except BaseException as error:  # noqa: BLE001 (a bug: raised at the next save)
            self.fault = error


def write_checkpoint(snapshot: Snapshot, folder: Path, run: str) -> Path:
    """Write `snapshot` to `folder`/step-N, completely or not at all, and return its folder.

    An existing checkpoint stays if it verifies and is replaced if not. Raises RunDirError if the disk has too little
    space, OSError or SafetensorError if it refuses.
    """
    final = folder / folder_name(snapshot.step)
    if not is_due(final, run):
        return final
    with staged_checkpoint(snapshot, final, run) as staged:
        snapshot.write(staged)
    return final


def is_due(final: Path, run: str) -> bool:
    """Return False if `final` is a checkpoint that verifies; one that does not is removed."""
    if os.path.lexists(final):
        if _verifies(final, run):
            return False
        remove_folder(final)
    return True


@contextmanager
def staged_checkpoint(snapshot: Snapshot, final: Path, run: str, processes: int = 1) -> Iterator[Path]:
    """Yield an empty folder for `snapshot`, which `processes` fill alike; after the block it is sealed as `final`.

    Nothing is left of it after an error.
    """
    folder = final.parent
    if not folder.exists():
        folder.mkdir(parents=True)
        sync(folder.parent)
    require_folder(folder)
    _require_space(folder, snapshot.size_bytes * processes)
    staged = staged_path(final)
    try:
        new_own_folder(staged)
        yield staged
        seal(staged, run=run, step=snapshot.step, eval_loss=snapshot.eval_loss, last=snapshot.is_last)
        staged.rename(final)
        sync(folder)
    finally:
        remove_own(staged)


def staged_path(final: Path) -> Path:
    """Return the folder in which the checkpoint `final` is written."""
    return final.with_name(f".{final.name}.staged")


def _verifies(folder: Path, run: str) -> bool:
    try:
        Checkpoint.open(folder, run=run)
    except LorafitError:
        return False
    return True


def _require_space(folder: Path, size_bytes: int) -> None:
    needed = int(size_bytes * FREE_SPACE_MARGIN)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise RunDirError(
            f"a checkpoint needs {needed / 2**20:.0f} MiB, but only {free / 2**20:.0f} MiB are free",
            where=str(folder),
            fix="free some space; earlier checkpoints are kept",
        )


class SaveTimer:
    """Decide when a checkpoint is due.

    It is due `minutes` after the last one or the start; 0 is never. `now` returns monotonic seconds, which no change of
    the wall clock moves.
    """

    def __init__(self, minutes: float, now: Callable[[], float] = time.monotonic) -> None:
        self.seconds, self.now = minutes * 60, now
        self.since = now()

    def start(self) -> None:
        """Count from now on: training starts, or a checkpoint is written."""
        self.since = self.now()

    def is_due(self) -> bool:
        """Return True once the time is over. The clock is read once."""
        return self.seconds > 0 and self.now() - self.since >= self.seconds
