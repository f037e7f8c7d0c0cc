"""Every single call of the system that fails ends in the result or in one sentence, from Python too.

Python's audit events stand for the calls (open, rename, mkdir, remove, …): a hook that raises makes the call fail.
"""

import errno
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import made_data as made
from lorafit.config import resolve
from lorafit.data import fix_rows
from lorafit.errors import LorafitError

CALLS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.link", "os.listdir", "os.scandir", "os.utime"}


class Fault:
    """Fails the call number `at` among those that name a path under `folder`."""

    def __init__(self) -> None:
        self.folder, self.at, self.seen = "", 0, 0

    def __call__(self, event: str, given: tuple[Any, ...]) -> None:
        if not self.folder or event not in CALLS or not str(given[0]).startswith(self.folder):
            return
        self.seen += 1
        if self.seen == self.at:
            raise OSError(errno.EIO, "Input/output error", str(given[0]))


FAULT = Fault()
sys.addaudithook(FAULT)  # there is no way to take a hook away: without a folder it does nothing


def failing_each(folder: Path, work: Callable[[], object], clear: Callable[[], None] = lambda: None) -> int:
    """How many calls `work` makes; each is failed once, and only a LorafitError may come of it."""
    at, failed = 1, True
    while failed:
        clear()
        FAULT.folder, FAULT.at, FAULT.seen = str(folder), at, 0
        try:
            work()
        except LorafitError as error:
            assert "\n" not in error.sentence
        finally:
            FAULT.folder, failed = "", FAULT.seen >= at
        at += 1
    return at - 2


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return made.write(tmp_path / "rows.jsonl", [*(made.row(number) for number in range(5)), {"instruction": "a"}])


def test_a_check_with_an_empty_cache(path: Path) -> None:
    def clear() -> None:
        shutil.rmtree(path.parent / "cache", ignore_errors=True)

    assert failing_each(path.parent, lambda: made.prepared(path), clear) > 40


def test_a_check_from_the_cache(path: Path) -> None:
    made.prepared(path)
    assert failing_each(path.parent, lambda: made.prepared(path)) > 20
    assert made.prepared(path).summary.cached


def test_a_fix(path: Path) -> None:
    made.write(path, path.read_bytes() + b"{broken\n")
    config = resolve({}, {"data": str(path)}).config
    outs = [path.parent / "out.jsonl", path.parent / "out.jsonl.rejected.jsonl"]

    def clear() -> None:
        for left in [*outs, *path.parent.glob(".lorafit-*")]:
            left.unlink(missing_ok=True)

    def fix() -> None:
        try:
            fix_rows(config, outs[0])
        except LorafitError:
            FAULT.folder = ""
            assert not any(out.exists() for out in outs), "half of the files stand there"
            raise

    assert failing_each(path.parent, fix, clear) >= 6
