"""A run that goes on from a trained adapter begins with its weights, names it, and wants the same ones to resume."""

import json
import os
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from little_run import write_rows
from lorafit.api.pipeline import AdapterTrainingPipeline
from lorafit.api.settings import settle
from lorafit.api.train import train
from lorafit.config import RunConfig
from lorafit.data.checks.initial_prompts import initial_prompt_findings
from lorafit.data.template.template import Template
from lorafit.data.tokenizer.tokenizer import TextTokenizer
from lorafit.demo import BASE
from lorafit.errors import AdapterError, RunDirError, TrainingStopped, UsageError
from lorafit.export.lineage import Lineage
from lorafit.runs import file_hash
from tiny_models import save_base

FILE = "adapter_model.safetensors"
SETTINGS = {"rank": 4, "targets": "attention", "lr": 5e-3, "max_steps": 4, "examples_per_step": 8}


class Stop(TrainerCallback):
    """Asks the run to stop at its third step, as a scheduler does."""

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("init")


@pytest.fixture(scope="module")
def rows(folder):
    return write_rows(folder / "tickets.jsonl", 40)


@pytest.fixture(scope="module")
def first(folder, rows):
    return train(rows, str(BASE), out=folder / "first", **SETTINGS).run


def going_on(folder, rows, first, **given):
    return train(rows, str(BASE), out=folder, init_adapter=first, max_steps=1, examples_per_step=8, **given)


@pytest.mark.parametrize("of", ["run", "adapter folder"])
def test_other_prompts_than_those_of_the_first_run_are_told(first, tmp_path, of):
    folder = first.path if of == "run" else shutil.copytree(first.adapter, tmp_path / "adapter")
    config, own = RunConfig(base=str(BASE), init_adapter=str(folder)), TextTokenizer.from_folder(BASE)
    assert initial_prompt_findings(config, Template.for_tokenizer(own)) == []
    (tmp_path / "other.jinja").write_text("{% for m in messages %}[{{ m.content }}]</s>{% endfor %}")
    (told,) = initial_prompt_findings(config, Template.for_tokenizer(own, str(tmp_path / "other.jinja")))
    assert (told.code, str(told.severity)) == ("D057", "warning")
    assert told.message.endswith("other prompts: the chat template makes other prompts")
    base = shutil.copytree(BASE, tmp_path / "base")
    made = json.loads((base / "tokenizer.json").read_text())
    ids = made["model"]["vocab"]
    ids["et"], ids["ra"] = ids["ra"], ids["et"]
    (base / "tokenizer.json").write_text(json.dumps(made))
    (told,) = initial_prompt_findings(config, Template.for_tokenizer(TextTokenizer.from_folder(base)))
    assert "the tokenizer has other tokens" in told.message


def test_it_begins_with_the_weights_and_the_shape_of_the_first(first, rows, tmp_path):
    second = going_on(tmp_path / "second", rows, first.path, lr=1e-12)
    config = second.resolved.config
    assert (config.rank, config.alpha, config.targets) == (4, 8.0, "attention")
    began, trained = load_file(second.run.adapter / FILE), load_file(first.adapter / FILE)
    assert began.keys() == trained.keys()
    for name in began:
        torch.testing.assert_close(began[name], trained[name], rtol=0, atol=1e-9)
    lineage = Lineage.read(second.run.adapter)
    assert list(lineage.init_adapter) == ["first", file_hash(first.adapter / FILE)]
    assert "| begun with | the adapter of first, sha256" in (second.run.adapter / "README.md").read_text()


def test_a_run_that_was_stopped_ends_in_the_bits_of_one_that_was_not(first, rows, tmp_path):
    given = {"init_adapter": first.path, "max_steps": 4, "save_steps": 2, "examples_per_step": 8, "lr": 5e-3}
    whole = train(rows, str(BASE), out=tmp_path / "whole", **given).run
    with pytest.raises(TrainingStopped):
        train(rows, str(BASE), out=tmp_path / "run", callbacks=[Stop()], **given)
    again = train(rows, str(BASE), out=tmp_path / "run", **given).run
    assert (again.adapter / FILE).read_bytes() == (whole.adapter / FILE).read_bytes()
    assert again.metrics.read_bytes() == whole.metrics.read_bytes()


def test_a_folder_of_pefts_will_do_and_a_resume_wants_the_same_weights(first, rows, tmp_path):
    plain = shutil.copytree(first.adapter, tmp_path / "plain")
    begun = going_on(tmp_path / "run", rows, plain)
    assert begun.resolved.config.targets == ("k_proj", "o_proj", "q_proj", "v_proj")
    shutil.rmtree(begun.run.adapter)  # so that something is left to do
    going_on(tmp_path / "run", rows, shutil.move(plain, tmp_path / "moved"))
    other = train(rows, str(BASE), out=tmp_path / "other", **{**SETTINGS, "seed": 1, "max_steps": 1}).run
    shutil.copy(other.adapter / FILE, tmp_path / "moved" / FILE)
    with pytest.raises(RunDirError, match="the initial adapter"):
        going_on(tmp_path / "run", rows, tmp_path / "moved")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"rank": 8}, "the initial adapter has rank 4, and this run 8"),
        ({"alpha": 9.0}, "the initial adapter has alpha 8, and this run 9"),
        ({"dora": True}, "the initial adapter has dora false, and this run true"),
        ({"method": "full"}, "method is full, which trains no adapter"),
        ({"init_adapter": "nowhere"}, "no adapter is there"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_read(first, rows, given, words):
    with pytest.raises(UsageError, match=words):
        settle(rows, {"base": str(BASE), "init_adapter": str(first.path), **given})


def test_other_targets_and_other_bases_are_refused(first, rows, tmp_path):
    with pytest.raises(AdapterError, match="this run's targets are other modules; leave targets out"):
        going_on(tmp_path / "a", rows, first.path, targets="qv")
    other = shutil.copytree(BASE, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"] *= 1.01
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    shallow = save_base(tmp_path / "shallow", num_hidden_layers=1, head_dim=32)
    for base, words in (
        (other, "trained on another base than this run's; set base"),
        (shallow, "does not fit this base"),
    ):
        with pytest.raises(AdapterError, match=words):
            train(rows, str(base), out=tmp_path / "b", init_adapter=first.path, max_steps=1)
    assert not (tmp_path / "a").exists() and not (tmp_path / "b").exists()


def test_the_pipeline_begins_with_it_too(first):
    pipeline = AdapterTrainingPipeline(str(BASE), 4, 8, targets="attention", init_adapter=str(first.path))
    model = pipeline.inject_adapters(pipeline.load_frozen_backbone())
    trained = load_file(first.adapter / FILE)
    name = next(name for name in trained if "lora_B" in name)
    assert torch.equal(model.get_parameter(name.replace(".weight", ".default.weight")).data, trained[name])
