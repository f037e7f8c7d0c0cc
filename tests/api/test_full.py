"""A full run goes the whole way: trained, resumed to the same bits, exported, proved, and asked."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from little_run import write_rows
from lorafit.api.load import load
from lorafit.api.merge import merge, verification_rows
from lorafit.api.ship.export import export
from lorafit.api.train import train
from lorafit.backbone import load_backbone
from lorafit.demo import BASE
from lorafit.errors import AdapterError, RunFinished, UsageError
from lorafit.export import FORMATS, verify
from lorafit.methods import METHODS
from lorafit.serve.launch import _require_run

SETTINGS = {
    "method": "full", "max_steps": 6, "save_steps": 2, "eval_steps": 3, "examples_per_step": 4, "lr": 1e-3,
    "holdout": 0.3, "ignore": "P",
}  # fmt: skip
QUESTION = [{"role": "user", "content": "Route this ticket to a queue.\nThe courier lost my red lamp."}]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", 60)


@pytest.fixture(scope="module")
def run(rows, tmp_path_factory):
    """A finished full run over the demo's base."""
    return train(rows, str(BASE), out=tmp_path_factory.mktemp("full") / "run", **SETTINGS)


@pytest.fixture(scope="module")
def merged(run):
    return merge(run.run.path)


def test_every_weight_trained_and_the_run_is_a_model(run):
    assert run.counts.trainable == run.counts.total > 3_000_000
    assert run.run.adapter.name == "model"
    settings = json.loads((run.run.adapter / "config.json").read_text())
    assert settings["dtype"] == "float32" and settings.get("use_cache", True)
    theirs = AutoModelForCausalLM.from_pretrained(run.run.adapter)
    for (name, ours), other in zip(run.model.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(ours, other), name
    plan = json.loads(run.run.plan.read_text())
    assert plan["method"] == "full fine-tuning" and plan["runnable"]
    assert plan["model"]["trainable_parameters"] == run.counts.trainable


def test_a_killed_run_resumes_to_the_bits_of_the_undisturbed_one(run, rows, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run.run.path, folder)
    shutil.rmtree(folder / "model")
    for later in (4, 6):
        shutil.rmtree(folder / "checkpoints" / f"step-{later:06d}")
    again = train(rows, str(BASE), out=folder, **SETTINGS)
    assert again.steps == 6
    for name in ("model/model.safetensors", "checkpoints/step-000006/optimizer.safetensors"):
        assert (folder / name).read_bytes() == (run.run.path / name).read_bytes(), name


def test_a_finished_run_says_so_and_a_changed_model_is_found(run, rows, tmp_path):
    with pytest.raises(RunFinished):
        train(rows, str(BASE), out=run.run.path, **SETTINGS)
    folder = shutil.copytree(run.run.path, tmp_path / "run")
    path = folder / "model" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-7] ^= 1
    path.write_bytes(content)
    for command in (load, merge):
        with pytest.raises(AdapterError, match=r"has changed since training \(model.safetensors differs\)"):
            command(folder)


def test_the_export_is_in_16_bits_and_proved_against_the_live_model(run, merged):
    assert merged.passed and merged.folder == run.run.exports / "full"
    result = merged.verification
    assert (result.onto, result.merged_dtype, result.live_dtype) == ("whole", "bfloat16", "float32")
    assert result.merged.kl <= 10 * result.floor.kl < result.base.kl
    exported = AutoModelForCausalLM.from_pretrained(merged.folder).state_dict()
    for name, ours in run.model.state_dict().items():
        assert torch.equal(exported[name], ours.bfloat16()), name


def test_an_export_with_one_wrong_weight_is_not_verified(run, merged, tmp_path):
    folder = shutil.copytree(merged.folder, tmp_path / "wrong")
    tensors = load_file(folder / "model.safetensors")
    wrong = "model.layers.0.mlp.down_proj.weight"
    save_file({**tensors, wrong: tensors[wrong].roll(1, 0)}, folder / "model.safetensors", metadata={"format": "pt"})
    config, method = run.run.config(), METHODS["full"]
    live = method.load(load_backbone(config), run.run.adapter, config)
    rows = verification_rows(run.run, run.template, 16)
    results = [
        verify(live, one, rows, "whole", method=method, export_format=FORMATS["safetensors"])
        for one in (shutil.copytree(merged.folder, tmp_path / "right"), folder)
    ]
    assert [result.passed for result in results] == [True, False]


def test_the_run_and_its_export_answer_as_the_trained_model_and_as_the_base(run, merged):
    session, served = load(run.run.path), load(merged.folder)
    tuned = session.answer(QUESTION, max_new_tokens=12)
    base = session.answer(QUESTION, max_new_tokens=12, tuned=False)
    assert session.answer(QUESTION, max_new_tokens=12) == tuned != base
    assert served.answer(QUESTION, max_new_tokens=12) == tuned


def test_what_needs_an_adapter_refuses_with_a_way_that_works(run):
    with pytest.raises(UsageError, match="a full run has no adapter") as refused:
        export(run.run.path, to="adapter")
    assert refused.value.fix == "export it with --to merged or --to gguf"
    with pytest.raises(UsageError, match="the builtin engine serves adapters") as refused:
        _require_run(run.run.path)
    assert f"lorafit merge {run.run.path}" in refused.value.fix


@pytest.mark.slow
def test_a_full_run_becomes_gguf(run, tmp_path):
    pytest.importorskip("gguf")
    exported = export(run.run.path, to="gguf", out=tmp_path / "gguf")
    assert exported.passed and list(exported.folder.glob("*.gguf"))


def test_the_memory_policy_does_not_change_the_run(run, rows, tmp_path):
    """Recomputed layers and packed micro-batches have the same gradient, of the head and the embeddings too."""
    again = train(rows, str(BASE), out=tmp_path / "run", **SETTINGS, memory_policy="recompute")
    for (name, ours), other in zip(run.model.named_parameters(), again.model.parameters(), strict=True):
        assert torch.allclose(ours, other, atol=2e-5), name
