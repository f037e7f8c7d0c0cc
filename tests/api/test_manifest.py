"""A run whose folder, or a part of it, is taken away while it trains ends with one sentence."""

import shutil
import threading

import pytest
from transformers import TrainerCallback

from lorafit.api import train as room
from lorafit.api.observer import Observer
from lorafit.api.train import train
from lorafit.cli import main
from lorafit.errors import RunDirError
from lorafit.runs import RunDir, RunIdentity, RunLock

SETTINGS = {"max_steps": 6, "save_steps": 2, "eval_steps": 3, "examples_per_step": 4, "lr": 5e-3, "holdout": 0.2}


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


@pytest.fixture(scope="module")
def whole(made, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(*made, out=folder, **SETTINGS)
    return folder


@pytest.mark.parametrize("step", [2, 5, 6])
def test_a_folder_that_was_removed_ends_the_run_and_is_not_made_again(made, tmp_path, step):
    run = tmp_path / "run"
    with pytest.raises(RunDirError, match=f"{run}: the run's folder was removed or taken") as caught:
        train(*made, out=run, callbacks=[At(step, lambda: shutil.rmtree(run))], **SETTINGS)
    assert "\n" not in str(caught.value)
    assert not run.exists()


@pytest.mark.parametrize("name", ["run.yaml", "template.json", "base.json", "held-out.jsonl", "fingerprint.json"])
def test_a_file_that_went_is_named_at_the_next_checkpoint(made, tmp_path, name):
    run = tmp_path / "run"
    with pytest.raises(RunDirError, match=f"{name} of this run disappeared while it trained; .*same command again"):
        train(*made, out=run, callbacks=[At(3, (run / name).unlink)], **SETTINGS)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-000002"]


def test_a_run_whose_place_another_took_ends_and_leaves_the_other_alone(made, whole, tmp_path):
    run = tmp_path / "run"

    def deed():
        shutil.rmtree(run)
        shutil.copytree(whole, run)

    with pytest.raises(RunDirError, match=f"{run}: the run's folder was removed or taken"):
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

    with pytest.raises(RunDirError, match="removed or taken"):
        train(*made, out=run, callbacks=[At(3, deed)], **SETTINGS)
    assert not (run / "run.yaml").exists() and not (run / "checkpoints").exists()
    assert other.is_held


def test_a_folder_that_went_before_training_began_is_an_error_that_names_it(made, tmp_path):
    class Removing(Observer):
        def on_dry_run(self, dry_run):
            shutil.rmtree(tmp_path / "run")

    with pytest.raises(RunDirError, match=r"run/\.lock: the run cannot be locked \(No such file"):
        train(*made, out=tmp_path / "run", observer=Removing(), **SETTINGS)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["adapter/adapter_config.json", "run.yaml"])
def test_nobody_says_done_without_the_adapter_and_its_description(made, tmp_path, monkeypatch, capsys, name):
    rows, base = made
    real, run = room.save_result, tmp_path / "run"

    def saved(*given):
        findings = real(*given)
        (run / name).unlink()
        return findings

    monkeypatch.setattr(room, "save_result", saved)
    with pytest.raises(SystemExit) as ended:
        main(["train", str(rows), "--base", base, "--out", str(run), "--set", "max_steps=1"])
    said = capsys.readouterr()
    assert ended.value.code == 1
    assert f"{name} of this run disappeared" in said.err
    assert "\ndone" not in said.out


def test_the_identity_of_a_finished_run_names_its_adapter(whole):
    now = RunIdentity.read(RunDir(whole).identity)
    files = {path.name for path in (whole / "adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "chat_template.jinja"} < set(now.adapter)
    assert set(now.adapter) == files - {"README.md"}
