"""Only what a run that never began has left is written over; a file of the same name may be somebody's own."""

import hashlib
import json
import shutil

import pytest

from lorafit.errors import RunDirError
from lorafit.runs import RunDir
from lorafit.runs.leftovers import FILES, foreign_names, is_leftover

OWN = {
    "plan.json": '{"weeks": [1, 2]}',
    "findings.json": '[{"code": "mine"}]',
    "engine.json": '{"engine": "V8"}',
    "template.json": '{"jinja": "{{ messages }}", "sha256": "0"}',
    "held-out.jsonl": '{"messages": [{"role": "user", "content": "a"}], "source": "web"}\n',
    "base.json": '{"base": "mine"}',
    "fingerprint.json": '{"finger": 1}',
    "rejected.jsonl": '{"row": 1}\n',
    "split.tsv": "row\tside\n1\ttrain\n",
    "events.jsonl": '{"event": "mine"}\n',
    "log.txt": "my diary\n",
    ".writable": "x",
    ".lock": "mine",
    ".lock.json": '{"pid": 1}',
}


def test_every_name_has_a_counterexample():
    assert set(OWN) == set(FILES)


@pytest.mark.parametrize("name", sorted(OWN))
def test_a_file_of_somebodys_own_is_never_written_over(tmp_path, name):
    folder = tmp_path / "mine"
    folder.mkdir()
    for content in (OWN[name], "\0\xff", "[" * 100_000, "null", "{}"):
        (folder / name).write_text(content)
        with pytest.raises(RunDirError, match=f"holds other files, such as {name}"):
            RunDir.create(folder)
        assert (folder / name).read_text() == content
        assert [path.name for path in folder.iterdir()] == [name]


def test_a_link_a_folder_and_a_second_name_are_no_leftovers(tmp_path):
    (tmp_path / "empty").write_text("")
    (tmp_path / "plan.json").symlink_to(tmp_path / "empty")
    (tmp_path / "findings.json").hardlink_to(tmp_path / "empty")
    (tmp_path / "base.json").mkdir()
    (tmp_path / "log.txt").symlink_to("nothing")
    for name in ("plan.json", "findings.json", "base.json", "log.txt"):
        assert not is_leftover(tmp_path / name)


def test_folders_are_leftovers_only_as_lorafit_makes_them(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "data").mkdir()
    assert is_leftover(tmp_path / "checkpoints") and is_leftover(tmp_path / "data")
    row = {"instruction": "a", "input": "b", "response": "c"}
    (tmp_path / "data" / "tickets-train.jsonl").write_text(json.dumps(row) + "\n")
    assert is_leftover(tmp_path / "data")
    (tmp_path / "data" / "mine.jsonl").write_text("")
    (tmp_path / "checkpoints" / "epoch-1").mkdir()
    assert not is_leftover(tmp_path / "checkpoints") and not is_leftover(tmp_path / "data")


def test_what_a_real_run_leaves_without_its_run_yaml_is_taken_for_a_leftover(tiny_run, tmp_path):
    folder = shutil.copytree(tiny_run.run.path, tmp_path / "run")
    (folder / "run.yaml").unlink()
    for name in ("metrics.jsonl", "timings.jsonl"):
        (folder / name).unlink()
    for name in ("adapter", "checkpoints", "exports"):
        shutil.rmtree(folder / name, ignore_errors=True)
    present = {path.name for path in folder.iterdir()}
    assert present >= {"plan.json", "findings.json", "template.json", "held-out.jsonl", "base.json", "split.tsv"}
    assert RunDir(folder).foreign() == []
    (folder / "template.json").unlink()
    assert RunDir(folder).foreign() == ["held-out.jsonl"]


def test_rows_kept_with_variables_of_the_template_are_a_leftover(tmp_path):
    jinja = "{{ messages }}"
    digest = hashlib.sha256(jinja.encode()).hexdigest()
    template = {"jinja": jinja, "sha256": digest, "tokenizer_sha256": "a", "stop_ids": [1], "golden": []}
    (tmp_path / "template.json").write_text(json.dumps(template))
    row = {"messages": [], "source": "rows.jsonl:1", "template_kwargs": {"enable_thinking": False}}
    (tmp_path / "held-out.jsonl").write_text(json.dumps(row) + "\n")
    assert foreign_names(tmp_path) == []
    (tmp_path / "held-out.jsonl").write_text(json.dumps(row | {"mine": 1}) + "\n")
    assert foreign_names(tmp_path) == ["held-out.jsonl"]
