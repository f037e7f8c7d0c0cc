"""Every single call of the system that fails ends in the result or in one sentence, from Python too.

Python's audit events stand for the calls (open, rename, mkdir, remove, …): a hook that raises makes the call fail.
"""

import errno
import os
import resource
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
        self.folder, self.at, self.seen, self.errno = "", 0, 0, errno.EIO

    def __call__(self, event: str, given: tuple[Any, ...]) -> None:
        if not self.folder or event not in CALLS or not str(given[0]).startswith(self.folder):
            return
        self.seen += 1
        if self.seen == self.at:
            raise OSError(self.errno, os.strerror(self.errno), str(given[0]))


FAULT = Fault()
sys.addaudithook(FAULT)  # there is no way to take a hook away: without a folder it does nothing


def failing_each(
    folder: Path, work: Callable[[], object], clear: Callable[[], None] = lambda: None, error_number: int = errno.EIO
) -> int:
    """How many calls `work` makes; each is failed once, and only a LorafitError may come of it."""
    FAULT.errno = error_number
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


@pytest.mark.parametrize("error_number", [errno.ENOENT, errno.ENOSPC, errno.EROFS])
def test_a_check_whose_entry_vanishes_or_whose_disk_is_full(path: Path, error_number: int) -> None:
    made.prepared(path)
    assert failing_each(path.parent, lambda: made.prepared(path), error_number=error_number) > 20
    rows = made.prepared(path).train
    assert len(rows) == 5 - len(made.prepared(path).holdout)


@contextmanager
def files_no_larger_than(size_bytes: int) -> Iterator[None]:
    """No file may grow beyond this: every write of data can fail half way, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


SIZES = (0, 1, 40, 130, 400, 1_000, 3_000, 1 << 30)


@pytest.mark.parametrize("size_bytes", SIZES)
def test_a_check_with_a_disk_that_fills_up(path: Path, size_bytes: int) -> None:
    made.write(path, [made.row(number) for number in range(30)])
    whole = made.prepared(path).train.content_hash
    shutil.rmtree(path.parent / "cache")
    failed = False
    with files_no_larger_than(size_bytes):
        try:
            made.prepared(path)
        except LorafitError as error:
            failed = "\n" not in error.sentence
    assert failed is (size_bytes < 1 << 30)
    again = made.prepared(path)
    assert again.train.content_hash == whole and again.summary.cached is not failed


@pytest.mark.parametrize("size_bytes", SIZES)
def test_a_fix_on_a_disk_that_fills_up(path: Path, size_bytes: int) -> None:
    made.write(path, made.jsonl([made.row(number) for number in range(30)]) + b"{broken\n")
    outs = [path.parent / "out.jsonl", path.parent / "out.jsonl.rejected.jsonl"]
    with files_no_larger_than(size_bytes):
        try:
            fix_rows(resolve({}, {"data": str(path)}).config, outs[0])
        except LorafitError as error:
            assert "\n" not in error.sentence and size_bytes < 1 << 30
    left = [file for file in path.parent.iterdir() if file != path]
    assert not left if size_bytes < 1 << 30 else sorted(left) == outs


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
