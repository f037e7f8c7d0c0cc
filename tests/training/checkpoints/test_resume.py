"""Where a run goes on: past what is damaged, saying why, and losing nothing of it."""

from lorafit.runs import clear_unfinished, newest_whole, set_aside
from lorafit.runs.checkpoint import seal


def checkpoint(folder, step, run="r"):
    path = folder / f"step-{step:06d}"
    path.mkdir()
    (path / "state.json").write_text("{}")
    seal(path, run=run, step=step, eval_loss=None)
    return path


def test_the_newest_that_verifies_is_found_and_the_others_are_named_with_their_reasons(tmp_path):
    for step in (2, 4, 6, 8, 1_000_000):
        checkpoint(tmp_path, step, "other" if step == 8 else "r")
    (tmp_path / "step-1000000" / "state.json").write_text("")
    (tmp_path / "step-000006" / "manifest.json").unlink()
    found, damaged = newest_whole(tmp_path, "r")
    assert found.step == 4
    assert [one.step for one in damaged] == [1_000_000, 8, 6]
    for one, words in zip(damaged, ("state.json has 0 of 2 bytes", "another run", "no manifest"), strict=True):
        assert words in one.reason


def test_where_nothing_is_there_a_run_begins_at_its_beginning(tmp_path):
    assert newest_whole(tmp_path / "nowhere", "r") == (None, [])


def test_damaged_ones_are_renamed_never_deleted(tmp_path):
    path = checkpoint(tmp_path, 6)
    (path / "state.json").write_text("x")
    set_aside(newest_whole(tmp_path, "r")[1])
    assert (tmp_path / "step-000006.damaged" / "state.json").read_text() == "x"
    assert newest_whole(tmp_path, "r") == (None, [])


def test_what_a_killed_process_was_writing_or_removing_is_cleared(tmp_path):
    whole = checkpoint(tmp_path, 2)
    for name in (".step-000004.staged", ".step-000001.removed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "state.json").write_text("half")
    clear_unfinished(tmp_path)
    assert list(tmp_path.iterdir()) == [whole]
