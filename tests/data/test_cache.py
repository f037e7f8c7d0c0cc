"""The cache: a second run finds the rows, and only when nothing they depend on has changed."""

import errno
from pathlib import Path
from typing import Any

import pytest

import made_data as made
from lorafit.data import cache
from lorafit.data.gather import Gatherer
from lorafit.errors import DataError

ROWS = [made.row(number) for number in range(25)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return made.write(tmp_path / "rows.jsonl", [*ROWS, {"instruction": "a"}])


def test_a_second_run_reads_nothing_again_and_says_the_same(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = made.prepared(path, run_dir=path.parent / "one")
    monkeypatch.setattr(Gatherer, "run", lambda self: pytest.fail("the file was read again"))
    second = made.prepared(path, run_dir=path.parent / "other")
    assert (first.summary.cached, second.summary.cached) == (False, True)
    assert second.findings == first.findings
    assert second.train.content_hash == first.train.content_hash
    assert second.rejected is not None
    assert first.rejected is not None
    assert second.rejected.read_bytes() == first.rejected.read_bytes()


@pytest.mark.parametrize(
    "settings",
    [
        {"on_bad": "drop"},
        {"holdout": 0.3},
        {"seed": 5},
        {"ignore": ("D041", "D010")},
        {"examples_per_step": 4},
        {"max_length": 99},
    ],
)
def test_settings_that_do_not_touch_the_rows_keep_the_cache(path: Path, settings: dict[str, Any]) -> None:
    made.prepared(path)
    assert made.prepared(path, **settings).summary.cached


@pytest.mark.parametrize(
    "settings", [{"field_map": {"input": "instruction"}}, {"ignore": ("D013",)}, {"ignore": ("D03",)}]
)
def test_settings_that_do_touch_the_rows_do_not(path: Path, settings: dict[str, Any]) -> None:
    made.prepared(path)
    assert not made.prepared(path, **settings).summary.cached


def test_changed_bytes_are_read_again(path: Path) -> None:
    made.prepared(path)
    made.write(path, [*ROWS, made.row(99)])
    result = made.prepared(path)
    assert not result.summary.cached
    assert result.summary.kept == 26


def test_a_killed_build_is_never_found(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Gatherer, "_finish", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            made.prepared(path)
    assert list((path.parent / "cache").iterdir()) == []
    assert made.prepared(path).summary.kept == 25


@pytest.mark.parametrize("name", ["facts.json", "tokens.bin", "text.bin", "line.npy", "names.json"])
def test_a_damaged_entry_is_built_again(path: Path, name: str) -> None:
    before = made.prepared(path)
    (entry,) = (path.parent / "cache").iterdir()
    damaged = entry / name
    damaged.write_bytes(damaged.read_bytes()[:-5] + b"" if name != "tokens.bin" else b"1234")
    after = made.prepared(path)
    assert not after.summary.cached
    assert after.train.content_hash == before.train.content_hash
    assert made.prepared(path).summary.cached


def test_a_full_disk_is_one_sentence(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Gatherer) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Gatherer, "run", full)
    with pytest.raises(DataError, match=r"cannot keep the rows there \(No space left on device\)"):
        made.prepared(path)
    assert list((path.parent / "cache").iterdir()) == []


def test_the_longest_unused_entries_go_when_there_is_no_room(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made.prepared(path)
    monkeypatch.setattr(cache, "LIMIT_BYTES", 10)
    made.write(path, ROWS)
    made.prepared(path)
    assert len(list((path.parent / "cache").iterdir())) == 1
    assert made.prepared(path).summary.cached


def test_the_cache_is_where_the_user_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LORAFIT_CACHE", str(tmp_path / "mine"))
    assert cache.default_folder() == tmp_path / "mine" / "data"
    monkeypatch.delenv("LORAFIT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.default_folder() == tmp_path / "xdg" / "lorafit" / "data"
