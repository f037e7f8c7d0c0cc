"""The lock of a run directory: one process at a time, and one that was killed holds nothing."""

import errno
import fcntl
import json
import multiprocessing
import os
import signal
import time
from dataclasses import asdict, replace

import pytest

from lorafit.errors import RunDirError
from lorafit.runs import RunLock, writing
from lorafit.runs.writing import LOCK, OWNER, Owner

CONTEXT = multiprocessing.get_context("fork")


def hold(folder, taken):
    with RunLock(folder):
        taken.set()
        time.sleep(60)


@pytest.fixture
def holder(tmp_path):
    taken = CONTEXT.Event()
    process = CONTEXT.Process(target=hold, args=(tmp_path, taken))
    process.start()
    assert taken.wait(30)
    yield process
    process.kill()
    process.join()


def test_a_second_process_is_refused_in_one_sentence_that_names_the_first(holder, tmp_path):
    with (
        pytest.raises(RunDirError, match=rf"process {holder.pid} on .* is training this run") as caught,
        RunLock(tmp_path),
    ):
        pass
    assert "\n" not in str(caught.value)
    assert (tmp_path / LOCK).exists(), "the refused one must not remove the owner's lock"


def test_a_second_lock_in_the_same_process_is_refused_too(tmp_path):
    with RunLock(tmp_path), pytest.raises(RunDirError, match=f"process {os.getpid()}"), RunLock(tmp_path):
        pass


def test_a_killed_owner_holds_nothing(holder, tmp_path):
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    assert (tmp_path / LOCK).exists()
    with RunLock(tmp_path):
        assert json.loads((tmp_path / OWNER).read_text())["pid"] == os.getpid()
    assert not (tmp_path / LOCK).exists()


@pytest.mark.parametrize("left", ["", "{", '{"pid": 1}', json.dumps([1, 2])])
def test_a_damaged_lock_holds_nothing(tmp_path, left):
    (tmp_path / LOCK).write_text(left)
    (tmp_path / OWNER).write_text(left)
    with RunLock(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def left_by(tmp_path, **other):
    (tmp_path / OWNER).write_text(json.dumps(asdict(replace(Owner(), **other))))


def test_a_lock_from_before_a_reboot_of_this_machine_is_stale(tmp_path):
    left_by(tmp_path, boot="another", pid=1)
    with RunLock(tmp_path):
        pass


def test_a_lock_of_another_container_on_this_machine_that_was_killed_is_stale(tmp_path):
    left_by(tmp_path, host="elsewhere", pid=1)
    with RunLock(tmp_path):
        pass


def test_the_lock_of_another_machine_stands_and_says_what_to_do(tmp_path):
    left_by(tmp_path, boot="another", host="elsewhere", pid=77)
    with (
        pytest.raises(
            RunDirError, match=r"process 77 on elsewhere .*if that machine no longer exists, remove .*\.lock\.json"
        ),
        RunLock(tmp_path),
    ):
        pass
    assert "elsewhere" in (tmp_path / OWNER).read_text()


def without_flock(monkeypatch, number):
    def unsupported(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", unsupported)


def test_where_the_disk_has_no_flock_the_owners_process_decides(tmp_path, monkeypatch, recwarn):
    without_flock(monkeypatch, errno.ENOSYS)
    taken = CONTEXT.Event()
    process = CONTEXT.Process(target=hold, args=(tmp_path, taken))
    process.start()
    assert taken.wait(30)
    with pytest.raises(RunDirError, match=f"process {process.pid}"), RunLock(tmp_path):
        pass
    process.kill()
    process.join()
    with RunLock(tmp_path) as lock:
        assert lock.is_held
    assert not list(tmp_path.iterdir())
    assert not recwarn.list


def test_a_disk_that_refuses_locks_is_one_sentence(tmp_path, monkeypatch):
    without_flock(monkeypatch, errno.ENOLCK)
    with (
        pytest.raises(RunDirError, match=r"\.lock: the run cannot be locked \(No locks available\); .*--out"),
        RunLock(tmp_path),
    ):
        pass


def contend(folder, index, results):
    for _ in range(40):
        try:
            with RunLock(folder):
                mark = folder / "inside"
                mark.touch(exist_ok=False)
                mark.unlink()
                results[index] += 1
        except RunDirError:
            continue


def test_processes_that_race_for_it_are_never_both_inside(tmp_path):
    results = CONTEXT.Array("i", 3)
    racers = [CONTEXT.Process(target=contend, args=(tmp_path, index, results)) for index in range(3)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join(60)
        assert racer.exitcode == 0
    assert sum(results) > 0
    assert not (tmp_path / LOCK).exists()


def test_a_lock_whose_folder_was_removed_is_taken_again(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    with RunLock(folder) as lock:
        lock.hold()
        (folder / LOCK).unlink()
        lock.hold()
        with pytest.raises(RunDirError, match=f"process {os.getpid()}"), RunLock(folder):
            pass
    assert not (folder / LOCK).exists()


def test_a_lock_that_another_took_meanwhile_is_left_to_it(tmp_path):
    with RunLock(tmp_path) as lock:
        (tmp_path / LOCK).unlink()
        with RunLock(tmp_path) as other:
            with pytest.raises(RunDirError, match="is training this run"):
                lock.hold()
            assert (tmp_path / LOCK).exists()
            other.hold()


def test_a_full_disk_is_one_sentence_with_the_path_and_no_lock_stays(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(writing, "new_own", full)
    with pytest.raises(RunDirError, match=r"\.lock: .*No space left on device"), RunLock(tmp_path):
        pass
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    with RunLock(tmp_path):
        assert (tmp_path / LOCK).exists()
