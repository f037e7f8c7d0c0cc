"""preflight: everything that would end the run later, named before it starts and all at once."""

import json
import os
import shutil
import time
from collections import namedtuple

import pytest

from little_run import settings, write_rows
from lorafit.api import preflight
from lorafit.api.plan import plan
from lorafit.api.preflight import before_loading, before_reading, require_ready
from lorafit.api.train import train
from lorafit.backbone import base_damages
from lorafit.demo import BASE
from lorafit.errors import BackboneError, PlanError, RunDirError
from lorafit.findings import Finding, Severity
from lorafit.hardware import Hardware
from lorafit.runs import RunDir
from tiny_models import save_base

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def base(tmp_path):
    """A tiny base of several shards."""
    folder = save_base(tmp_path / "base")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("planned")
    return plan(write_rows(folder / "rows.jsonl"), str(BASE), max_length=256)


def codes(findings):
    return [finding.code for finding in findings]


def test_a_sound_machine_has_nothing_to_say(planned, tmp_path):
    config = planned.resolved.config
    assert before_reading(config, RunDir(tmp_path / "run")) == []
    assert not [f for f in before_loading(planned, RunDir(tmp_path / "run"), lambda: True) if f.severity == "error"]


def test_every_damaged_file_of_the_base_is_named_at_once(base, tmp_path):
    first, second, third, *_ = sorted(base.glob("*.safetensors"))
    first.unlink()
    second.write_bytes(second.read_bytes()[:-7])
    third.write_bytes((200_000).to_bytes(8, "little") + b"[" * 200_000)
    findings = before_reading(settings(base=str(base)), RunDir(tmp_path / "run"))
    assert codes(findings) == ["S001"] * 3
    told = " ".join(f"{finding.where} {finding.message}" for finding in findings)
    assert all(path.name in told for path in (first, second, third))


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ("{not json", "is not valid JSON"),
        (json.dumps({"weight_map": {"a": "../../outside.safetensors"}}), "outside the folder"),
        (json.dumps({"weight_map": {}}), "names no files"),
    ],
)
def test_an_index_that_cannot_be_trusted_is_named(base, index, words):
    (base / "model.safetensors.index.json").write_text(index)
    (damage,) = base_damages(base)
    assert words in damage.what


def test_a_tensor_that_the_index_names_and_no_file_holds_is_named(base):
    path = base / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.no.such.weight"] = next(iter(index["weight_map"].values()))
    path.write_text(json.dumps(index))
    (damage,) = base_damages(base)
    assert "model.no.such.weight" in damage.what


def test_pickled_weights_are_refused(base):
    for path in base.glob("*.safetensors*"):
        path.unlink()
    (base / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    (damage,) = base_damages(base)
    assert "pickled" in damage.what


def test_a_folder_that_cannot_be_written_is_named(planned, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    assert codes(before_reading(planned.resolved.config, RunDir(tmp_path / "file" / "run"))) == ["S002"]
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: access(path, mode) and str(path) != str(tmp_path))
    assert codes(before_reading(planned.resolved.config, RunDir(tmp_path / "a" / "b"))) == ["S002"]


def test_a_clock_before_the_data_is_a_warning(planned, tmp_path, monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 0.0)
    (finding,) = before_reading(planned.resolved.config, RunDir(tmp_path / "run"))
    assert (finding.code, finding.severity) == ("S003", Severity.WARNING)
    assert "1970-01-01" in finding.message
    require_ready([finding])


@pytest.mark.parametrize(("free", "severity"), [(0, "error"), (19 << 20, "warning"), (1 << 40, None)])
def test_space_is_wanted_for_checkpoints_and_for_an_export(planned, tmp_path, monkeypatch, free, severity):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(1 << 41, 0, free))
    found = [f for f in before_loading(planned, RunDir(tmp_path / "run"), lambda: True) if f.code == "S004"]
    assert [finding.severity.value for finding in found] == ([severity] if severity else [])


def test_a_gpu_that_torch_cannot_use_is_an_error():
    gpu = Hardware(name="NVIDIA H200", kind="cuda", memory_bytes=1 << 37)
    assert codes(preflight._gpu(gpu, lambda: False)) == ["S005"]
    assert codes(preflight._gpu(gpu, lambda: True)) == []
    processor = Hardware(
        name="cpu", kind="cpu", memory_bytes=1 << 30, notes=("an H200 is here, but torch has no CUDA",)
    )
    (finding,) = preflight._gpu(processor, lambda: False)
    assert (finding.code, finding.severity) == ("S005", Severity.WARNING)


def error(code, message, where=""):
    return Finding(code, Severity.ERROR, message, where=where, fix="mend it")


def test_one_error_names_everything_that_stands_in_the_way():
    with pytest.raises(PlanError) as caught:
        require_ready(
            [error("S001", "a is missing", "base/a"), error("S002", "no room", "out"), error("P0", "too large")]
        )
    words = str(caught.value)
    assert words.startswith("3 findings stop this run")
    assert all(part in words for part in ("(1) base/a: a is missing", "(2) out: no room", "(3) P0: too large"))
    assert "\n" not in words


@pytest.mark.parametrize(("code", "kind"), [("S001", BackboneError), ("S002", RunDirError), ("P0", PlanError)])
def test_a_single_one_is_an_error_of_its_kind(code, kind):
    with pytest.raises(kind, match="here: it is so; mend it"):
        require_ready([error(code, "it is so", "here")])


def test_train_refuses_before_it_reads_the_data_and_leaves_nothing(base, tmp_path):
    data = write_rows(tmp_path / "rows.jsonl")
    for path in sorted(base.glob("*.safetensors"))[:2]:
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(PlanError, match="2 findings stop this run"):
        train(data, str(base), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_train_refuses_what_the_plan_and_the_disk_say_together(tmp_path, monkeypatch):
    data = write_rows(tmp_path / "rows.jsonl")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(1 << 41, 0, 0))
    with pytest.raises(PlanError, match=r"findings stop this run: .* gpu_memory allows 1.0 MiB.* checkpoints need"):
        train(data, str(BASE), out=tmp_path / "run", gpu_memory="1MiB")
    assert not (tmp_path / "run").exists()
