"""Where a run goes: its own folder again, the next free one, or nowhere, with both values named."""

from pathlib import Path

import pytest

from lorafit.config import resolve
from lorafit.errors import RunDirError, RunFinished
from lorafit.runs import RunDir, RunFingerprint, RunIdentity, RunLock, held_settings
from lorafit.runs.lookup import find_target, next_free, refuse_finished, set_run_aside


def settled(**given):
    return resolve(flags={"base": "some/base", "data": ("rows.jsonl",), **given})


def begun(path, resolved, *, finished=False, plan=None):
    """A run directory as train leaves it once the run has begun."""
    run = RunDir.create(path)
    planned = resolved.planned(plan or {"rank": 8, "alpha": 16.0, "optimizer": "adamw"})
    fingerprint = RunFingerprint("a", "b", "c", "d", held_settings(planned.config))
    run.write_json(run.identity, RunIdentity("id", fingerprint).to_dict())
    run.write_config(planned.config, {key: source.value for key, source in planned.sources.items()})
    if finished:
        run.adapter.mkdir()
        (run.adapter / "adapter_model.safetensors").write_text("")
    return run


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_new_run_goes_to_a_folder_named_after_data_and_base():
    place = find_target(settled())
    assert (str(place.run.path), place.resumes) == ("runs/rows-base", False)


@pytest.mark.parametrize("finished", [False, True])
def test_the_same_settings_find_their_run_again(here, finished):
    begun(here / "runs/rows-base-2", settled(), finished=finished)
    begun(here / "runs/rows-base", settled(seed=7))
    place = find_target(settled())
    assert (place.run.path.name, place.resumes) == ("rows-base-2", True)


def test_other_settings_go_to_the_next_free_folder(here):
    begun(here / "runs/rows-base", settled())
    place = find_target(settled(lr=0.5))
    assert (place.run.path.name, place.resumes) == ("rows-base-2", False)
    assert next_free(settled()).path.name == "rows-base-2"


def test_what_was_planned_is_taken_over_and_what_is_set_must_agree(here):
    run = begun(here / "run", settled())
    place = find_target(settled(out="run"))
    taken = place.settled(settled(out="run"))
    assert (taken.config.rank, taken.sources["rank"].value) == (8, "run")
    assert find_target(settled(out="run", rank=8)).resumes
    with pytest.raises(RunDirError, match=r"started with rank = 8, now it is 32 \(and alpha\)"):
        find_target(settled(out="run", rank=32))
    assert run.config().rank == 8


def test_a_named_folder_refuses_other_settings_with_both_values(here):
    begun(here / "run", settled())
    with pytest.raises(
        RunDirError, match=r"unfinished run in this folder was started with lr = 0\.0002, now it is 0\.5; .*--restart"
    ) as caught:
        find_target(settled(out="run", lr=0.5))
    assert "\n" not in str(caught.value)


def test_the_settings_of_a_run_as_a_recipe_go_on_with_it(here):
    """The command that is printed when a run is stopped: train RUN/run.yaml --out RUN."""
    from lorafit.config import load_recipe

    run = begun(here / "run", settled(lr=0.01))
    assert find_target(resolve(load_recipe(run.settings), {"out": "run"})).resumes


def test_restart_moves_the_run_aside_and_never_deletes(here):
    for number in (1, 2):
        run = begun(here / "run", settled(seed=number))
        place = find_target(settled(out="run"), restart=True)
        assert not place.resumes
        assert set_run_aside(place.run).name == f"run.aside-{number}"
        assert RunDir(here / f"run.aside-{number}").config().seed == number
        assert sorted(path.name for path in (here / f"run.aside-{number}").iterdir()) == [
            "fingerprint.json",
            "run.yaml",
        ]
        assert not run.path.exists()


def test_restart_where_nothing_is_begins_a_run(here):
    place = find_target(settled(out="run"), restart=True)
    assert set_run_aside(place.run) is None


def test_restart_does_not_touch_a_run_that_is_training(here):
    run = begun(here / "run", settled())
    with RunLock(run.path), pytest.raises(RunDirError, match="is training this run"):
        set_run_aside(run)
    assert run.holds_run


def test_a_finished_run_says_so_with_exit_code_zero(here):
    run = begun(here / "run", settled(), finished=True)
    with pytest.raises(RunFinished, match=r"nothing is left to train; pass --restart") as caught:
        refuse_finished(run)
    assert (caught.value.exit_code, caught.value.label) == (0, "finished")


def test_a_folder_with_other_peoples_files_is_left_alone_even_with_restart(here):
    (here / "run").mkdir()
    (here / "run" / "thesis.tex").write_text("")
    for restart in (False, True):
        with pytest.raises(RunDirError, match=r"holds other files, such as thesis\.tex"):
            find_target(settled(out="run"), restart=restart)


def test_what_a_run_left_that_was_killed_before_it_began_is_no_obstacle(here):
    run = RunDir.create(here / "run")
    for name in (
        "plan.json",
        "findings.json",
        "template.json",
        ".held-out.jsonl.staged",
        "fingerprint.json",
        "engine.json",
        ".lock",
        ".lock.json",
    ):
        (run.path / name).write_text("")
    assert not find_target(settled(out="run")).resumes


def test_a_run_whose_fingerprint_is_lost_is_not_taken_for_another(here):
    begun(here / "run", settled()).identity.unlink()
    with pytest.raises(RunDirError, match="nothing shows what the run was trained from"):
        find_target(settled(out="run"))


def test_a_damaged_run_that_may_be_the_one_is_not_passed_over_in_silence(here):
    run = begun(here / "runs/rows-base", settled())
    run.identity.write_text("{")
    with pytest.raises(RunDirError, match=r"rows-base.*cannot be read.*--restart"):
        find_target(settled())
    assert find_target(settled(), restart=True).run == RunDir(Path("runs/rows-base"))
    assert find_target(settled(lr=0.5)).run.path.name == "rows-base-2", "that run is not meant"
    run.settings.write_text("{")
    with pytest.raises(RunDirError, match=r"rows-base.*cannot be compared.*--out"):
        find_target(settled())
