"""A link, pipe or second name that somebody planted in a run folder leads no writer out of it."""

import os
import socket

import pytest

from lorafit.errors import RunDirError
from lorafit.runs import (
    RunDir,
    RunLock,
    append_own,
    new_own,
    open_own,
    read_own,
    refuse_planted,
    remove_own,
    staged_folder,
    write_text,
)
from lorafit.runs.own_files import CHANGED_IN_PLACE

PLACES = (
    *("run.yaml", "template.json", "held-out.jsonl", "fingerprint.json", ".template.json.staged", ".writable"),
    *("adapter", "adapter/adapter_config.json", ".adapter.staged", ".adapter.old", "checkpoints", "exports"),
    *(
        "checkpoints/step-000002",
        "checkpoints/step-000002/adapter/adapter_model.safetensors",
        "exports/merged",
    ),
    *("rejected.jsonl", "split.tsv", ".lock.json", *sorted(CHANGED_IN_PLACE)),
)


@pytest.fixture
def victim(tmp_path):
    path = tmp_path / "victim"
    path.write_text("dear")
    return path


@pytest.fixture
def run(tmp_path):
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


@pytest.mark.parametrize("name", PLACES)
def test_a_link_is_refused_wherever_it_lies(run, victim, name):
    (run / name).parent.mkdir(parents=True, exist_ok=True)
    for target in (victim, victim.parent, victim.with_name("nothing")):
        (run / name).symlink_to(target)
        with pytest.raises(RunDirError, match=f"{name}: the entry is a symbolic link.*remove it"):
            refuse_planted(run)
        (run / name).unlink()
    refuse_planted(run, writes=True)


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: socket.socket(socket.AF_UNIX).bind(str(path))])
def test_a_pipe_or_socket_stops_no_reader(run, make, monkeypatch):
    monkeypatch.chdir(run)  # a socket's name is short
    make("template.json")
    with pytest.raises(RunDirError, match=r"the entry is a (pipe|socket), which a run never holds"):
        refuse_planted(run)
    for opening in (read_own, lambda path: append_own(path, "x")):
        with pytest.raises(OSError, match=r"pipe|socket|No such device"):
            opening(run / "template.json")


@pytest.mark.parametrize("name", sorted(CHANGED_IN_PLACE))
def test_a_second_name_of_a_file_that_is_changed_in_place_is_refused_to_writers(run, victim, name):
    os.link(victim, run / name)
    refuse_planted(run)
    with pytest.raises(RunDirError, match="has a second name"):
        refuse_planted(run, writes=True)
    with pytest.raises(OSError, match="hard link"):
        append_own(run / name, "x")
    assert victim.read_text() == "dear"


def test_a_run_folder_may_be_a_link_itself_and_hold_folders_that_lorafit_does_not_know(run, victim):
    (run / "notes").mkdir()
    (run / "notes" / "latest").symlink_to(victim)
    run.with_name("mine").symlink_to(run)
    refuse_planted(run.with_name("mine"), writes=True)


def test_no_function_that_writes_follows_a_link(run, victim):
    link = run / "log.txt"
    for write in (lambda: append_own(link, "x"), lambda: os.close(open_own(link, os.O_RDWR | os.O_CREAT))):
        link.symlink_to(victim)
        with pytest.raises(OSError, match="it is a symbolic link"):
            write()
        link.unlink()
    link.symlink_to(victim)
    with os.fdopen(new_own(link), "w") as file:
        file.write("own")
    assert (link.read_text(), link.is_symlink()) == ("own", False)
    for name in ("plan.json", ".plan.json.staged"):
        (run / name).symlink_to(victim)
    write_text(run / "plan.json", "own")
    assert not (run / "plan.json").is_symlink()
    assert victim.read_text() == "dear"


def test_a_staged_folder_replaces_a_link_of_its_name_and_nothing_that_it_leads_to(run, victim):
    elsewhere = victim.with_name("elsewhere")
    elsewhere.mkdir()
    (elsewhere / "keep").write_text("dear")
    for name in (".adapter.staged", ".adapter.old", "adapter"):
        (run / name).symlink_to(elsewhere)
    with staged_folder(run / "adapter", replace=True) as staged:
        (staged / "weights").write_text("own")
    assert [path.name for path in run.iterdir()] == ["adapter"]
    assert (run / "adapter" / "weights").read_text() == "own"
    (run / "link").symlink_to(elsewhere)
    remove_own(run / "link")
    assert [path.name for path in elsewhere.iterdir()] == ["keep"]


@pytest.mark.parametrize("plant", ["symlink_to", "hardlink_to"])
@pytest.mark.parametrize("name", [".lock", ".lock.json"])
def test_the_lock_writes_to_no_other_file(run, victim, plant, name):
    getattr(run / name, plant)(victim)
    if name == ".lock":
        with pytest.raises(RunDirError, match=r"cannot be locked.*(symbolic|hard) link"), RunLock(run):
            pass
    else:
        with RunLock(run):
            pass
    assert victim.read_text() == "dear"


def test_the_question_whether_a_folder_is_writable_writes_to_no_file(run, victim):
    (run / ".writable").symlink_to(victim)
    RunDir(run).require_writable()
    assert victim.read_text() == "dear"


def test_no_pipe_or_device_is_renamed_over(run):
    """Root could: a file in the place of /dev/full would fill the memory of the machine."""
    os.mkfifo(run / "plan.json")
    with pytest.raises(RunDirError, match="it is a pipe"):
        write_text(run / "plan.json", "own")
    with pytest.raises(OSError, match="it is a pipe"):
        new_own(run / "plan.json")
    assert (run / "plan.json").is_fifo()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_another_user_owns_is_one_sentence(run):
    run.chmod(0o500)
    with pytest.raises(RunDirError, match="not writable"):
        RunDir(run).require_writable()
