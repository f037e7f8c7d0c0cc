"""Runs of the fault campaign, each in a process forked from one that has imported everything, and their table."""

import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from fault_injection import At
from fault_subjects import Subject

from lorafit.errors import LorafitError

TIMEOUT_S = 120
MOUNT_BYTES = 64 << 20


@dataclass
class Row:
    """One line of the table: what was done, how often, and how often it went well; None where it does not apply."""

    fault: str
    subject: str
    tries: int = 0
    survived: int = 0
    detected: int | None = None
    identical: int | None = None
    note: str = ""

    def add(self, *, survived: bool, detected: bool | None = None, identical: bool | None = None) -> None:
        self.tries += 1
        self.survived += survived
        if detected is not None:
            self.detected = (self.detected or 0) + detected
        if identical is not None:
            self.identical = (self.identical or 0) + identical

    def cells(self) -> list[str]:
        counts = (self.survived, self.detected, self.identical)
        return [f"{count} of {self.tries}" if count is not None else "–" for count in counts]

    @property
    def is_clean(self) -> bool:
        return all(count in (None, self.tries) for count in (self.survived, self.detected, self.identical))


@dataclass
class Campaign:
    """Where it runs, how large it is, and what it found."""

    folder: Path
    draw: random.Random
    short: bool
    rows: list[Row] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    kills: int = 0

    def row(self, fault: str, subject: Subject) -> Row:
        self.rows.append(Row(fault, subject.name))
        print(f"… {fault} ({subject.name})", file=sys.stderr, flush=True)
        return self.rows[-1]

    def fresh(self) -> Path:
        return Path(tempfile.mkdtemp(dir=self.folder)) / "run"


def in_child(work: Callable[[], None], log: Path, *, kill_after_s: float | None = None) -> int:
    """Run `work` in a forked process; its exit code, or minus the signal that ended it."""
    pid = os.fork()
    if pid == 0:
        be_the_child(work, log)
    deadline = time.monotonic() + (TIMEOUT_S if kill_after_s is None else kill_after_s)
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            kill_after_s, deadline = 0.0, float("inf")
        time.sleep(0.002)


def be_the_child(work: Callable[[], None], log: Path) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    code = 70
    try:
        work()
        code = 0
    except LorafitError as error:
        print(error.sentence, flush=True)
        code = error.exit_code
    except BaseException:  # noqa: BLE001 (a forked child ends here, whatever it was)
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def attempt(subject: Subject, folder: Path, *callbacks: At, kill_after_s: float | None = None) -> int:
    """One process that begins the run in `folder`, or goes on with it."""
    log = folder.parent / "output.txt"
    return in_child(lambda: subject.train(folder, list(callbacks)), log, kill_after_s=kill_after_s)


def output(folder: Path) -> str:
    """What the attempts in `folder` printed."""
    return (folder.parent / "output.txt").read_text(errors="replace")


def reference(campaign: Campaign, subject: Subject) -> dict[str, str]:
    """The result of the undisturbed run; and how long it takes."""
    folder = campaign.fresh()
    began = time.monotonic()
    code = attempt(subject, folder)
    if code != 0:
        sys.exit(f"the undisturbed run of {subject.name} failed:\n{output(folder)}")
    campaign.seconds[subject.name] = time.monotonic() - began
    return subject.result(folder)


def ends_as(subject: Subject, folder: Path, wanted: dict[str, str]) -> tuple[bool, bool]:
    """(survived, identical): train on in `folder` to the end, and compare."""
    code = attempt(subject, folder)
    if code != 0:
        print(f"exit code {code}:\n{output(folder)[-1500:]}" if subject.name == "lorafit" else "", file=sys.stderr)
        return False, False
    return True, subject.result(folder) == wanted


@contextmanager
def small_disk(campaign: Campaign) -> Iterator[Path | None]:
    """A tmpfs of 64 MiB, or None where this process may not mount one."""
    place = campaign.folder / "disk"
    place.mkdir(exist_ok=True)
    if os.system(f"mount -t tmpfs -o size={MOUNT_BYTES} tmpfs {place} 2>/dev/null") != 0:
        yield None
        return
    try:
        yield place
    finally:
        os.system(f"umount {place}")


def table(rows: list[Row]) -> str:
    """Markdown: one line a fault, lorafit and the Trainer side by side; then the notes."""
    heads = ("survived", "detected", "same bits")
    columns = [f"{name}: {head}" for name in ("lorafit", "Trainer") for head in heads]
    lines = ["| fault | " + " | ".join(columns) + " |", "|---" * 7 + "|"]
    by_fault = {row.fault: {"lorafit": [""] * 3, "Trainer": [""] * 3} for row in rows}
    for row in rows:
        by_fault[row.fault][row.subject] = row.cells()
    lines += [f"| {fault} | {' | '.join(cells['lorafit'] + cells['Trainer'])} |" for fault, cells in by_fault.items()]
    return "\n".join([*lines, "", *(f"- {row.subject}, {row.fault}: {row.note}" for row in rows if row.note)])


def versions() -> str:
    """What it ran with."""
    return ", ".join(f"{name} {version(name)}" for name in ("lorafit", "transformers", "peft", "torch"))
