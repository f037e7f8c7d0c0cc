"""CheckpointWriter: write snapshots on a thread; a full disk does not end the run."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from lorafit.config import RunConfig
from lorafit.errors import LorafitError, RunDirError
from lorafit.runs import Checkpoint, new_own_folder, remove_own, require_folder, sync
from lorafit.runs.checkpoint import checkpoint_folders, folder_name, prune, remove_folder, seal
from lorafit.training.checkpoints.snapshot import Snapshot
from lorafit.training.logging.run_logs import EventLog

FREE_SPACE_MARGIN = 1.1


class CheckpointWriter:
    """Write one snapshot at a time to `folder`/step-N: staged, synced, sealed, renamed, parent synced.

    An error is kept until `wait` or `poll` and becomes an event there, on the caller's thread. A full disk does not end
    the run: a failed checkpoint never touches the last good one, and the next save tries again.
    """

    def __init__(self, folder: Path, config: RunConfig, run: str, events: EventLog) -> None:
        self.folder, self.config, self.run, self.events = folder, config, run, events
        self.thread: threading.Thread | None = None
        self.failure: tuple[int, str] | None = None
        self.fault: BaseException | None = None

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

    def _write(self, snapshot: Snapshot) -> None:
        try:
            write_checkpoint(snapshot, self.folder, self.run)
            prune(self.folder, keep_last=self.config.keep_last, keep_best=self.config.keep_best)
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
    if os.path.lexists(final):
        if _verifies(final, run):
            return final
        remove_folder(final)
    if not folder.exists():
        folder.mkdir(parents=True)
        sync(folder.parent)
    require_folder(folder)
    _require_space(folder, snapshot.size_bytes)
    staged = folder / f".{final.name}.staged"
    try:
        new_own_folder(staged)
        snapshot.write(staged)
        seal(staged, run=run, step=snapshot.step, eval_loss=snapshot.eval_loss, last=snapshot.is_last)
        staged.rename(final)
        sync(folder)
    finally:
        remove_own(staged)
    return final


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
