"""CheckpointWriter: snapshots go to disk on a thread of their own; a disk that refuses does not end the run."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from lorafit.config import RunConfig
from lorafit.errors import LorafitError, RunDirError
from lorafit.runs import sync
from lorafit.training.checkpoints.folder import (
    Checkpoint,
    checkpoint_folders,
    folder_name,
    prune,
    remove_folder,
    seal,
)
from lorafit.training.checkpoints.snapshot import Snapshot
from lorafit.training.logging.run_logs import EventLog

FREE_SPACE_MARGIN = 1.1


class CheckpointWriter:
    """Writes one snapshot at a time to `folder`/step-N: staged, synced, sealed, renamed, the parent synced.

    What goes wrong is kept until `wait` or `poll` and becomes an event there, on the caller's thread. A run does not
    end for a full disk: the last good checkpoint is never touched by a failed one, and the next save tries again.
    """

    def __init__(self, folder: Path, config: RunConfig, run: str, events: EventLog) -> None:
        self.folder, self.config, self.run, self.events = folder, config, run, events
        self.thread: threading.Thread | None = None
        self.failure: tuple[int, str] | None = None
        self.fault: BaseException | None = None

    def save(self, snapshot: Snapshot) -> None:
        """Begin to write `snapshot`, after the one before it is done."""
        self.wait()
        # a daemon: a second Ctrl-C must not wait for a slow disk, and a staged folder harms nobody
        self.thread = threading.Thread(target=self._write, args=(snapshot,), name="lorafit-checkpoint", daemon=True)
        self.thread.start()

    def wait(self) -> None:
        """Until nothing is being written; reports what went wrong."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        self.poll()

    def poll(self) -> None:
        """Report what went wrong, without waiting. What no disk is to blame for is raised."""
        failure, self.failure = self.failure, None
        fault, self.fault = self.fault, None
        if fault is not None:
            raise fault
        if failure is not None:
            self._report(*failure)

    def newest(self) -> Path | None:
        """The newest checkpoint's folder."""
        return next(reversed(checkpoint_folders(self.folder)), None)

    def _report(self, step: int, reason: str) -> None:
        last = self.newest()
        kept = f"{last.name} is kept" if last else "there is none yet"
        message = f"the checkpoint of step {step} could not be written ({reason}): {kept}, the next save tries again"
        self.events.record("checkpoint_failed", step, message)

    def _write(self, snapshot: Snapshot) -> None:
        try:
            write_checkpoint(snapshot, self.folder, self.run)
            prune(self.folder, keep_last=self.config.keep_last, keep_best=self.config.keep_best)
        except LorafitError as error:
            self.failure = (snapshot.step, error.what)
        except (OSError, SafetensorError) as error:
            self.failure = (snapshot.step, f"{getattr(error, 'strerror', None) or error}")
        except BaseException as error:  # noqa: BLE001 (ours to mend: raised where the next save would begin)
            self.fault = error


def write_checkpoint(snapshot: Snapshot, folder: Path, run: str) -> Path:
    """Write `snapshot` to `folder`/step-N, whole or not at all; its folder.

    A checkpoint that is there already stays when it verifies and is replaced when it does not. Raises RunDirError
    when there is too little space, OSError or SafetensorError when the disk refuses.
    """
    final = folder / folder_name(snapshot.step)
    if final.exists():
        if _verifies(final, run):
            return final
        remove_folder(final)
    if not folder.is_dir():
        folder.mkdir(parents=True)
        sync(folder.parent)
    _require_space(folder, snapshot.size_bytes)
    staged = folder / f".{final.name}.staged"
    try:
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir()
        snapshot.write(staged)
        seal(staged, run=run, step=snapshot.step, eval_loss=snapshot.eval_loss, last=snapshot.is_last)
        staged.rename(final)
        sync(folder)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
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
            f"a checkpoint needs {needed / 2**20:.0f} MiB and {free / 2**20:.0f} MiB are free",
            where=str(folder),
            fix="free some space; earlier checkpoints are whole",
        )


class SaveTimer:
    """A checkpoint is due `minutes` after the last one, or after training began; 0: never.

    `now` gives seconds that no change of the wall clock moves.
    """

    def __init__(self, minutes: float, now: Callable[[], float] = time.monotonic) -> None:
        self.seconds, self.now = minutes * 60, now
        self.since = now()

    def start(self) -> None:
        """Count from here on: training begins, or a checkpoint is written."""
        self.since = self.now()

    def is_due(self) -> bool:
        """True once the time is over; the clock is read once."""
        return self.seconds > 0 and self.now() - self.since >= self.seconds
