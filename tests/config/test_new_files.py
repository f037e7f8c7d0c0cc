"""NewFiles: every file is new, all of them appear together, and nothing of anybody else's is touched."""

import errno
import os
from pathlib import Path

import pytest

from lorafit.config import NewFiles
from lorafit.errors import DataError


def write(places: list[Path], inputs: list[Path] | None = None, *, fail: BaseException | None = None) -> None:
    with NewFiles(places, inputs=inputs or [], error=DataError) as new:
        for number, stream in enumerate(new.streams):
            stream.write(str(number).encode())
        if fail is not None:
            raise fail


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_files_appear_together_when_the_block_ends_well(tmp_path: Path) -> None:
    with NewFiles([tmp_path / "a", tmp_path / "b"], error=DataError) as new:
        new.streams[0].write(b"1")
        assert not (tmp_path / "a").exists()
    assert (tmp_path / "a").read_bytes() == b"1"
    assert names(tmp_path) == ["a", "b"]


def test_a_file_left_out_is_not_made(tmp_path: Path) -> None:
    with NewFiles([tmp_path / "a", tmp_path / "b"], error=DataError) as new:
        new.leave_out(tmp_path / "b")
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("fail", [ValueError("x"), KeyboardInterrupt()])
def test_a_block_that_fails_leaves_nothing(tmp_path: Path, fail: BaseException) -> None:
    with pytest.raises(type(fail)):
        write([tmp_path / "a", tmp_path / "b"], fail=fail)
    assert names(tmp_path) == []


def test_an_error_of_the_disk_within_the_block_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot be written \(No space left on device\)"):
        write([tmp_path / "a"], fail=OSError(errno.ENOSPC, "No space left on device"))
    assert names(tmp_path) == []


def test_a_dangling_link_is_a_file_that_is_there(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DataError, match="is there already"):
        write([tmp_path / "a"])
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_an_input_under_another_name_is_an_input(tmp_path: Path, link: object) -> None:
    (tmp_path / "in").write_bytes(b"rows")
    link(tmp_path / "in", tmp_path / "out")  # type: ignore[operator]
    with pytest.raises(DataError, match="is an input"):
        write([tmp_path / "out"], [tmp_path / "in"])
    assert (tmp_path / "in").read_bytes() == b"rows"


@pytest.mark.parametrize("links", [True, False])
def test_a_file_that_comes_to_stand_there_meanwhile_is_kept(
    tmp_path: Path, links: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not links:
        monkeypatch.setattr(os, "link", no_links)
    with (
        pytest.raises(DataError, match="b: is there already"),
        NewFiles([tmp_path / "a", tmp_path / "b"], error=DataError),
    ):
        (tmp_path / "b").write_bytes(b"precious")
    assert names(tmp_path) == ["b"]
    assert (tmp_path / "b").read_bytes() == b"precious"


def no_links(source: Path, target: Path) -> None:
    raise OSError(errno.EPERM, "Operation not permitted")


def test_a_file_system_without_links_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", no_links)
    write([tmp_path / "a", tmp_path / "b"])
    assert (tmp_path / "b").read_bytes() == b"1"
    assert names(tmp_path) == ["a", "b"]
