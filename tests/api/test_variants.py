"""Variants of LoRA, rank-stabilized and DoRA in one run: in training, on disk, in PEFT, merged and refused."""

import json
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from little_run import write_rows
from lorafit.api.merge import merge
from lorafit.api.ship.export import export
from lorafit.api.ship.merge_proof import MergeProof
from lorafit.api.train import train
from lorafit.config import RunConfig, resolve
from lorafit.demo import BASE
from lorafit.errors import UsageError
from lorafit.export import format_named
from lorafit.serve.launch import _require_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("variants")
    data = write_rows(folder / "tickets.jsonl", 40)
    given = {"rslora": True, "dora": True, "rank": 64, "lr": 5e-3, "max_steps": 6, "examples_per_step": 8}
    return train(data, str(BASE), out=folder / "run", **given)


def test_the_run_has_the_scale_of_two_and_peft_reads_the_same(run):
    from peft import PeftModel

    assert (run.resolved.config.alpha, run.resolved.config.scale) == (16.0, 2.0)
    written = json.loads((run.run.adapter / "adapter_config.json").read_text())
    assert (written["use_rslora"], written["use_dora"], written["lora_alpha"], written["r"]) == (True, True, 16.0, 64)
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32), run.run.adapter)
    scales = {
        value
        for module in plain.modules()
        if isinstance(getattr(module, "scaling", None), dict)
        for value in module.scaling.values()
    }
    assert scales == {2.0}


def test_its_merge_is_the_trained_model(run):
    assert merge(run.run.path, onto="quantized").verification.passed


def test_programs_that_add_adapters_refuse_dora_in_one_sentence(run):
    with pytest.raises(UsageError, match="the run is DoRA, which rescales the base's weights"):
        _require_run(run.run.path)
    with pytest.raises(UsageError, match=r"neither vLLM nor .* serves DoRA adapters; export it"):
        export(run.run.path, to="adapter")


def test_alpha_follows_the_root_of_the_rank_unless_it_is_set():
    assert resolve(flags={"rank": 64}).config.alpha == 128
    assert resolve(flags={"rank": 64, "use_rslora": True}).config.alpha == 16
    assert resolve(flags={"rank": 64, "rslora": True, "alpha": 8.0}).config.scale == 1.0
    with pytest.raises(UsageError, match="√rank is 2000, and adapters load with at most 1024; set alpha to 4096"):
        resolve(flags={"rank": 16, "rslora": True, "alpha": 8000.0})


@pytest.fixture(scope="module")
def principal(tmp_path_factory):
    """A run that begins as PiSSA and trains a row of the embedding."""
    folder = tmp_path_factory.mktemp("principal")
    data = write_rows(folder / "tickets.jsonl", 40)
    given = {"init_lora_weights": "pissa", "trainable_tokens": "</s>", "rank": 4, "lr": 1e-3, "examples_per_step": 8}
    return train(data, str(BASE), out=folder / "run", max_steps=4, **given).run, data


def test_a_pissa_run_is_a_plain_lora_of_twice_the_rank_over_the_base_itself(principal):
    run = principal[0]
    written = json.loads((run.adapter / "adapter_config.json").read_text())
    assert (written["r"], written["lora_alpha"], written["init_lora_weights"]) == (8, 16.0, True)
    assert written["trainable_token_indices"] == {"model.embed_tokens": [1]}
    assert merge(run.path, onto="quantized").verification.passed
    assert "begun as PiSSA" in (run.adapter / "README.md").read_text()


def test_a_run_goes_on_from_a_pissa_run_as_plain_lora(principal, tmp_path):
    first, data = principal
    given = {"init_adapter": str(first.path), "max_steps": 1, "lr": 1e-12, "examples_per_step": 8}
    config = train(data, str(BASE), out=tmp_path / "second", **given).resolved.config
    assert (config.rank, config.init_lora_weights, config.trainable_tokens) == (8, "default", ("</s>",))
    with pytest.raises(UsageError, match="init_adapter names the weights to begin with; leave one of them out"):
        train(data, str(BASE), out=tmp_path / "third", **given, init_lora_weights="olora")


def test_rows_of_tokens_are_not_served_beside_other_adapters(principal):
    with pytest.raises(UsageError, match="trained rows of the embedding, which the server's base shares"):
        _require_run(principal[0].path)
    with pytest.raises(UsageError, match=r"vLLM and llama\.cpp take from the base alone; export it with --to merged"):
        export(principal[0].path, to="adapter")


def test_a_loftq_run_is_merged_onto_the_base_that_it_corrects():
    config = RunConfig(base=str(BASE), init_lora_weights="loftq")
    form, run = format_named("safetensors"), SimpleNamespace(config=config)
    assert MergeProof(run, [], None).candidates(form) == ("quantized",)
    with pytest.raises(UsageError, match=r"restore what quantizing lost.*; write --onto quantized"):
        MergeProof(run, [], None, onto="original").candidates(form)
