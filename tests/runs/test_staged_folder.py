import errno
import os
from pathlib import Path

import pytest

from lorafit.errors import RunDirError
from lorafit.runs import staged_folder, writing


def test_the_folder_appears_whole_at_the_end_and_not_before(tmp_path):
    with staged_folder(tmp_path / "deep" / "out") as staged:
        (staged / "a.txt").write_text("a")
        assert not (tmp_path / "deep" / "out").exists()
    assert (tmp_path / "deep" / "out" / "a.txt").read_text() == "a"
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_nothing_behind(tmp_path, error):
    with pytest.raises(error), staged_folder(tmp_path / "out") as staged:
        (staged / "a.txt").write_text("a")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_an_error_and_stays(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "keep").write_text("x")
    with pytest.raises(RunDirError, match="already exists"), staged_folder(tmp_path / "out"):
        pass
    assert (tmp_path / "out" / "keep").exists()


def test_a_full_disk_is_one_sentence(tmp_path):
    with pytest.raises(RunDirError, match="No space left"), staged_folder(tmp_path / "out"):
        raise OSError(28, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_is_a_file_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunDirError, match="cannot be written"), staged_folder(tmp_path / "file" / "out"):
        pass


@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize("failing", ["sync", "rename"])
def test_a_folder_that_cannot_be_published_leaves_what_was_there(tmp_path, monkeypatch, replace, failing):
    folder = tmp_path / "result"
    if replace:
        folder.mkdir()
        (folder / "old").write_text("old")
    sync, rename = writing.sync, Path.rename

    def fails(path, *to):
        if (failing == "sync" and path == tmp_path) or (failing == "rename" and path.name.endswith(".staged")):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return (rename if to else sync)(path, *to)

    monkeypatch.setattr(writing if failing == "sync" else Path, failing, fails)
    with pytest.raises(RunDirError, match="No space left"), staged_folder(folder, replace=replace) as staged:
        (staged / "new").write_text("new")
    monkeypatch.undo()
    assert [path.name for path in tmp_path.rglob("*")] == (["result", "old"] if replace else [])
