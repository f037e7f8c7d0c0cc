"""The cache: a second run finds the rows, and only when nothing they depend on has changed."""

import errno
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import made_data as made
from lorafit.config import resolve
from lorafit.data import Prepared, cache, prepare
from lorafit.data.gather import Gatherer
from lorafit.data.sealed_folder import MANIFEST, is_whole, publish
from lorafit.errors import DataError
from template_shapes import template_of

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


@pytest.mark.parametrize("settings", [{"field_map": {"system": "input"}}, {"ignore": ("D013",)}, {"ignore": ("D03",)}])
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


def test_a_flipped_bit_in_any_file_is_a_miss_and_the_entry_is_made_again(path: Path) -> None:
    before = made.prepared(path)
    (entry,) = (path.parent / "cache").iterdir()
    names = [file.name for file in entry.iterdir() if file.stat().st_size]
    assert {"facts.json", "tokens.bin", "text.bin", "leader.npy", "names.json", "manifest.json"} <= {
        *names,
        "tokens.bin",
    }
    for name in names:
        flip(entry / name)
        assert not is_whole(entry), f"a flipped bit in {name} was not seen"
        after = made.prepared(path)
        assert not after.summary.cached, f"an entry with a flipped bit in {name} was taken"
        assert after.train.content_hash == before.train.content_hash
        assert made.prepared(path).summary.cached


@pytest.mark.parametrize("harm", ["cut", "grown", "missing", "more", "no manifest", "odd manifest"])
def test_an_entry_that_is_not_as_it_was_sealed_is_a_miss(path: Path, harm: str) -> None:
    made.prepared(path)
    (entry,) = (path.parent / "cache").iterdir()
    damaged = entry / "text.bin"
    content = damaged.read_bytes()
    if harm == "missing":
        damaged.unlink()
    elif harm == "more":
        (entry / "other.npy").write_bytes(b"")
    elif harm == "no manifest":
        (entry / MANIFEST).unlink()
    elif harm == "odd manifest":
        (entry / MANIFEST).write_text("[" * 100_000)
    else:
        damaged.write_bytes(content[:-5] if harm == "cut" else content + b"x")
    assert not is_whole(entry)
    assert not made.prepared(path).summary.cached
    assert made.prepared(path).summary.cached


def flip(file: Path) -> None:
    """Change one bit in the middle of `file`."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_threads_and_processes_share_an_empty_cache(path: Path) -> None:
    """Two processes that take themselves for number 7, as two containers do, and four threads in each."""
    code = (
        "import os, sys; from concurrent.futures import ThreadPoolExecutor; from pathlib import Path\n"
        "os.getpid = lambda: 7\n"
        "import made_data as made; path = Path(sys.argv[1])\n"
        "with ThreadPoolExecutor(4) as pool:\n"
        "    print({r.train.content_hash for r in pool.map(lambda _: made.prepared(path), range(4))})\n"
    )
    command = [sys.executable, "-c", code, str(path)]
    surroundings = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    for _ in range(2):
        shutil.rmtree(path.parent / "cache", ignore_errors=True)
        racers = [subprocess.Popen(command, stdout=subprocess.PIPE, env=surroundings) for _ in range(2)]
        answers = {racer.communicate(timeout=60)[0] for racer in racers}
        assert [racer.returncode for racer in racers] == [0, 0]
        assert answers == {f"{ {made.prepared(path).train.content_hash} }\n".encode()}
        assert [entry.name for entry in (path.parent / "cache").iterdir() if entry.name.endswith(".partial")] == []


def test_a_damaged_entry_is_replaced_by_many_at_once(path: Path) -> None:
    made.prepared(path)
    (entry,) = (path.parent / "cache").iterdir()
    for _ in range(3):
        flip(entry / "line.npy")
        with ThreadPoolExecutor(4) as pool:
            results = list(pool.map(lambda _: made.prepared(path), range(4)))
        assert len({result.train.content_hash for result in results}) == 1
        assert is_whole(entry)


def test_a_place_that_others_fill_meanwhile_is_published_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, fresh = tmp_path / "place", tmp_path / "around" / "new"
    for folder in (place, fresh):
        folder.mkdir(parents=True)
        (folder / "file").write_text(folder.name)
    original, aside = Path.rename, []

    def filled_again(self: Path, target: Path) -> Path:
        moved = original(self, target)
        if self == place and not aside:
            aside.append(shutil.copytree(moved, place))
        return moved

    monkeypatch.setattr(Path, "rename", filled_again)
    publish(fresh, place)
    assert aside and is_whole(place) and (place / "file").read_text() == "new"


def test_entries_that_vanish_under_the_housekeeping_do_not_fail_the_work(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made.prepared(path)
    (entry,) = (path.parent / "cache").iterdir()
    for number in range(3):
        shutil.copytree(entry, entry.with_name(f"{number:064x}"))
    original = Path.rglob

    def vanishing(self: Path, pattern: str) -> Any:
        found = list(original(self, pattern))
        shutil.rmtree(self, ignore_errors=True) if self.name.startswith("000") else None
        return found

    monkeypatch.setattr(Path, "rglob", vanishing)
    made.write(path, ROWS)
    assert made.prepared(path).summary.kept == 25


def test_an_entry_that_always_vanishes_is_one_sentence(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def kept(place: Path, build: Any, is_usable: Any) -> bool:
        return True

    monkeypatch.setattr(cache, "kept", kept)
    with pytest.raises(DataError, match="removed or changed at once"):
        made.prepared(path)


def test_only_entries_are_ever_removed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """LORAFIT_CACHE may be a folder whose `data` is the user's own."""
    monkeypatch.setattr(cache, "LIMIT_BYTES", 10)
    mine = path.parent / "cache" / "my-corpus"
    mine.mkdir(parents=True)
    made.write(mine / "rows.jsonl", ROWS)
    made.prepared(path)
    assert (mine / "rows.jsonl").read_bytes() == made.jsonl(ROWS)


def test_what_killed_builds_left_behind_goes_after_a_day(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = path.parent / "cache" / f"{'a' * 64}.killed.partial" / "new"
    left.mkdir(parents=True)
    (left / "tokens.bin").write_bytes(b"1234")
    made.prepared(path)
    assert left.exists()
    monkeypatch.setattr(cache, "STALE_S", -1.0)
    made.write(path, ROWS)
    made.prepared(path)
    assert not left.parent.exists()


def test_an_entry_has_the_rights_of_any_other_folder(path: Path) -> None:
    made.prepared(path)
    (entry,) = (path.parent / "cache").iterdir()
    plain = path.parent / "plain"
    plain.mkdir()
    assert entry.stat().st_mode == plain.stat().st_mode


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


@pytest.mark.parametrize("name", ["tokens.bin", "text.bin"])
def test_rows_that_a_check_left_unread_are_checked_before_the_first_is_read(tmp_path: Path, name: str) -> None:
    path = made.write(tmp_path / "rows.jsonl", [made.row(number) for number in range(5)])
    template = template_of(tmp_path / "base", "chatml")
    config = resolve({}, {"data": str(path), "holdout": 0.0}).config

    def checked() -> Prepared:
        return prepare(config, template, cache_dir=tmp_path / "cache", reads_rows=False)

    whole = checked().train.content_hash
    entry = next((tmp_path / "cache").iterdir())
    damaged = bytearray((entry / name).read_bytes())
    damaged[7] ^= 4
    (entry / name).write_bytes(damaged)
    found = checked()
    assert found.summary.cached and len(found.train) == 5
    for read in (found.train.ids, found.train.record):
        with pytest.raises(DataError, match=r"rows kept there are damaged.*run the command again"):
            read(0)
    again = checked()
    assert not again.summary.cached and again.train.content_hash == whole
    assert checked().train.ids(0).tolist() == again.train.ids(0).tolist()
