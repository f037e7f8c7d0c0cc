"""A run whose folder somebody empties while it trains says so and makes it whole, or ends with an error."""

import json
import shutil
import signal
import threading

import pytest
from transformers import TrainerCallback

from lorafit.api import fitting
from lorafit.api.observer import Observer
from lorafit.api.train import train
from lorafit.cli import main
from lorafit.config import RunDir, RunIdentity, RunLock, require_trained_adapter
from lorafit.errors import RunDirError, RunFinished, TrainingStopped

SETTINGS = {"max_steps": 6, "save_steps": 2, "eval_steps": 3, "examples_per_step": 4, "lr": 5e-3, "holdout": 0.2}
SAME = ("adapter/adapter_model.safetensors", "metrics.jsonl", "checkpoints/step-000006/optimizer.safetensors")
DESCRIPTION = ("run.yaml", "template.json", "base.json", "held-out.jsonl", "split.tsv")
NAMES = {*DESCRIPTION, "fingerprint.json", "plan.json", "findings.json"}


class At(TrainerCallback):
    """Does `deed` when step `step` begins."""

    def __init__(self, step, deed):
        self.step, self.deed = step, deed

    def on_step_begin(self, args, state, control, **_):
        if state.global_step + 1 == self.step:
            for thread in threading.enumerate():
                if thread.name == "lorafit-checkpoint":
                    thread.join()  # else the deed and the writer race
            self.deed()


class Watch(Observer):
    def __init__(self):
        self.events = []

    def happened(self, event):
        self.events.append(event)


@pytest.fixture(scope="module")
def whole(made, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(*made, out=folder, **SETTINGS)
    return folder


@pytest.mark.parametrize("step", [2, 5, 6])
def test_a_folder_that_was_removed_is_made_whole_again_and_that_is_said(made, whole, tmp_path, step):
    run, watch = RunDir(tmp_path / "run"), Watch()
    train(*made, out=run.path, observer=watch, callbacks=[At(step, lambda: shutil.rmtree(run.path))], **SETTINGS)
    (event,) = watch.events
    assert event.kind == "described_again"
    assert all(name in event.message for name in NAMES)
    assert ("all checkpoints had gone" in event.message) == (step > 2)
    for name in (*SAME, *DESCRIPTION):
        assert (run.path / name).read_bytes() == (whole / name).read_bytes(), name
    there, before = ({path.name for path in one.iterdir()} - {"log.txt"} for one in (run.path, whole))
    assert there == before | {"events.jsonl"}
    require_trained_adapter(RunDir.open(run.path))
    with pytest.raises(RunFinished):
        train(*made, out=run.path, **SETTINGS)


def test_single_files_that_went_are_named_and_written_again(made, whole, tmp_path):
    run, watch = tmp_path / "run", Watch()

    def deed():
        for name in ("run.yaml", "metrics.jsonl"):
            (run / name).unlink()

    train(*made, out=run, observer=watch, callbacks=[At(4, deed)], **SETTINGS)
    (event,) = watch.events
    assert (event.step, event.message) == (4, f"run.yaml had gone from {run}, and is written again")
    for name in (*SAME, "run.yaml"):
        assert (run / name).read_bytes() == (whole / name).read_bytes(), name


def test_events_that_went_are_written_again_too(made, tmp_path):
    run, watch = tmp_path / "run", Watch()

    def deed():
        (run / "plan.json").unlink(missing_ok=True)
        (run / "events.jsonl").unlink(missing_ok=True)

    train(*made, out=run, observer=watch, callbacks=[At(1, deed), At(3, deed)], **SETTINGS)
    kept = [json.loads(line)["message"] for line in (run / "events.jsonl").read_text().splitlines()]
    assert kept == [event.message for event in watch.events]
    assert [("events.jsonl" in message) for message in kept] == [False, True]


def test_a_run_stopped_after_its_folder_was_removed_can_go_on_from_what_it_left(made, whole, tmp_path):
    run = tmp_path / "run"

    def deed():
        shutil.rmtree(run)
        signal.raise_signal(signal.SIGTERM)

    with pytest.raises(TrainingStopped, match="newest checkpoint is step-000003"):
        train(*made, out=run, callbacks=[At(3, deed)], **SETTINGS)
    train(*made, out=run, **SETTINGS)
    for name in SAME:
        assert (run / name).read_bytes() == (whole / name).read_bytes(), name


def test_a_run_whose_place_another_took_ends_and_leaves_the_other_alone(made, whole, tmp_path):
    run = tmp_path / "run"

    def deed():
        shutil.rmtree(run)
        shutil.copytree(whole, run)

    with pytest.raises(RunDirError, match=f"{run}: the folder was removed .* holds another run by now"):
        train(*made, out=run, callbacks=[At(3, deed)], **SETTINGS)
    for path in whole.rglob("*"):
        if path.is_file() and path.name not in ("log.txt", "timings.jsonl"):
            assert (run / path.relative_to(whole)).read_bytes() == path.read_bytes(), path.name


def test_a_run_whose_folder_another_process_trains_in_ends_too(made, tmp_path):
    run, other = tmp_path / "run", RunLock(tmp_path / "run")

    def deed():
        shutil.rmtree(run)
        run.mkdir()
        other.__enter__()

    with pytest.raises(RunDirError, match="is training this run"):
        train(*made, out=run, callbacks=[At(3, deed)], **SETTINGS)
    assert sorted(path.name for path in run.iterdir()) == [".lock", ".lock.json"]
    assert other.is_held


def test_a_folder_that_went_before_training_began_is_an_error_that_names_it(made, tmp_path):
    class Removing(Observer):
        def rehearsed(self, rehearsal):
            shutil.rmtree(tmp_path / "run")

    with pytest.raises(RunDirError, match=r"run/\.lock: cannot be locked \(No such file"):
        train(*made, out=tmp_path / "run", observer=Removing(), **SETTINGS)
    assert not (tmp_path / "run").exists()


def test_a_folder_that_is_removed_is_still_locked_for_others(made, tmp_path):
    run, refused = tmp_path / "run", []

    def again():
        with pytest.raises(RunDirError, match="is training this run"):
            train(*made, out=run, **SETTINGS)
        refused.append(True)

    train(*made, out=run, callbacks=[At(2, lambda: shutil.rmtree(run)), At(4, again)], **SETTINGS)
    assert refused


@pytest.mark.parametrize("name", ["adapter/adapter_config.json", "run.yaml"])
def test_nobody_says_done_without_the_adapter_and_its_description(made, tmp_path, monkeypatch, capsys, name):
    rows, base = made
    real, run = fitting.save_result, tmp_path / "run"

    def saved(*given):
        real(*given)
        (run / name).unlink()

    monkeypatch.setattr(fitting, "save_result", saved)
    with pytest.raises(SystemExit) as ended:
        main(["train", str(rows), "--base", base, "--out", str(run), "--set", "max_steps=1"])
    said = capsys.readouterr()
    assert ended.value.code == 1
    assert f"{name} of the trained run went" in said.err
    assert "\ndone" not in said.out


def test_the_identity_is_the_one_it_began_with(made, tmp_path):
    run, seen = RunDir(tmp_path / "run"), []

    def deed():
        seen.append(RunIdentity.read(run.identity))
        run.identity.unlink()

    train(*made, out=run.path, callbacks=[At(2, deed)], **SETTINGS)
    now = RunIdentity.read(run.identity)
    assert now == seen[0].ended_in(now.adapter)
    assert set(now.adapter) == {"adapter_config.json", "adapter_model.safetensors"}
