"""The run directory describes itself."""

import json

import pytest

from lorafit.config import resolve
from lorafit.errors import RunDirError
from lorafit.runs import RunDir


def test_settings_come_back_as_they_were_written(tmp_path):
    resolved = resolve(
        {"base": "some/base: odd", "data": ["a b.jsonl", "ü.jsonl"], "field_map": {"response": "answer text"}},
        {"targets": "q_proj,v_proj", "max_steps": 7, "holdout": "held.jsonl"},
    )
    run = RunDir.create(tmp_path / "run")
    run.write_config(resolved.config, {key: source.value for key, source in resolved.sources.items()})
    assert run.config() == resolved.config.model_copy(update={"out": None})
    assert "# flag" in run.settings.read_text()
    assert "# default" in run.settings.read_text()


def test_a_folder_that_holds_a_run_is_refused(tmp_path):
    (tmp_path / "run.yaml").write_text("rank: 8\n")
    with pytest.raises(RunDirError, match="already holds a run"):
        RunDir.create(tmp_path)


def test_a_folder_without_a_run_is_named(tmp_path):
    with pytest.raises(RunDirError, match=r"holds no run.*run\.yaml"):
        RunDir.open(tmp_path)


def test_a_run_without_adapter_is_told_to_finish(tmp_path):
    (tmp_path / "run.yaml").write_text("rank: 8\n")
    with pytest.raises(RunDirError, match="no adapter because its training has not finished"):
        RunDir.open(tmp_path)


def test_a_path_that_is_a_file_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunDirError, match="not writable"):
        RunDir.create(tmp_path / "file" / "run")


def test_json_is_written_whole_and_leaves_nothing_beside_it(tmp_path):
    run = RunDir(tmp_path)
    run.write_json(run.plan, {"a": 1})
    assert json.loads(run.plan.read_text()) == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_an_unfinished_run_names_its_last_checkpoint(tmp_path):
    (tmp_path / "run.yaml").write_text("rank: 8\n")
    (tmp_path / "checkpoints" / "step-000004").mkdir(parents=True)
    with pytest.raises(RunDirError, match=r"last checkpoint is .*step-000004"):
        RunDir.open(tmp_path)


@pytest.mark.parametrize("name", ["adapter", "checkpoints", "my_rows.jsonl"])
def test_what_a_run_would_overwrite_is_left_alone(tmp_path, name):
    (tmp_path / name / "something").mkdir(parents=True)
    with pytest.raises(RunDirError, match=f"holds other files, such as {name}"):
        RunDir.create(tmp_path)
