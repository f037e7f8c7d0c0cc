"""A stopped demo names the command that resumes it, and the same folder takes that command."""

import signal
from types import SimpleNamespace

import pytest

from lorafit.api import demo as module
from lorafit.demo import BASE, split_files, task_named
from lorafit.errors import RunDirError, TrainingStopped
from lorafit.runs import RunDir


@pytest.fixture
def started(tmp_path, monkeypatch):
    """Return the folder of a demo whose training was stopped, and the calls of train."""
    calls = []

    def stop(data, base, *, out, observer, **settings):
        calls.append(data)
        lines = f"base: {BASE}\nmethod: {settings.get('method', 'lora')}\nseed: {settings['seed']}\n"
        RunDir(out).settings.write_text(f"{lines}holdout: {settings['holdout']}\n")
        raise TrainingStopped(signal.SIGTERM, "SIGTERM after step 8 of 282", where=str(out), fix="resume with: TRAIN")

    monkeypatch.setattr(module, "train", stop)
    with pytest.raises(TrainingStopped):
        module.demo("tickets", 1, tmp_path / "run")
    return SimpleNamespace(folder=tmp_path / "run", calls=calls)


def test_a_stopped_demo_is_resumed_by_the_command_that_it_names(started):
    folder = started.folder
    before = {file: file.stat().st_mtime_ns for file in split_files(task_named("tickets"), folder / "data")}
    with pytest.raises(TrainingStopped) as found:
        module.demo("tickets", 1, folder)
    assert found.value.exit_code == 143
    assert found.value.fix == f"resume with: lorafit demo --task tickets --seed 1 --method lora --out {folder}"
    assert started.calls[0] == started.calls[1]
    assert before == {file: file.stat().st_mtime_ns for file in before}, "the rows of the run were written again"


@pytest.mark.parametrize("other", [("tickets", 2, "lora"), ("orders", 1, "lora"), ("tickets", 1, "full")])
def test_another_demo_is_refused_in_the_folder_of_a_stopped_one(started, other):
    task, seed, method = other
    with pytest.raises(RunDirError, match="a run that has not finished; choose another --out"):
        module.demo(task, seed, started.folder, method=method)
    assert not (started.folder / "data" / "orders-train.jsonl").exists()


def test_rows_without_a_run_are_written_again(started):
    RunDir(started.folder).settings.unlink()
    (file, _) = split_files(task_named("tickets"), started.folder / "data")
    whole = file.read_bytes()
    file.write_bytes(whole[:99])  # killed while they were written
    with pytest.raises(TrainingStopped):
        module.demo("tickets", 1, started.folder)
    assert file.read_bytes() == whole
    RunDir(started.folder).settings.unlink()
    (file.parent / "mine.txt").touch()
    with pytest.raises(RunDirError, match="other files"):
        module.demo("tickets", 1, started.folder)


def test_a_trained_demo_names_what_is_left(started):
    adapter = started.folder / "adapter"
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").touch()
    with pytest.raises(RunDirError) as found:
        module.demo("tickets", 1, started.folder)
    rest = f"lorafit eval {started.folder} and lorafit merge {started.folder}"
    assert found.value.fix == f"choose another --out, or measure and merge it: {rest}"
