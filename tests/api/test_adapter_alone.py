"""The adapter folder of a finished run serves alone: by plain transformers and PEFT, old ones too."""

import json
import shutil

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from lorafit.api.train import train
from lorafit.errors import RunFinished
from lorafit.runs import RunDir, RunIdentity, require_trained_run

OLD_KEYS = {
    "peft_type", "task_type", "base_model_name_or_path", "revision", "r", "lora_alpha", "lora_dropout",
    "target_modules", "bias", "fan_in_fan_out", "init_lora_weights", "inference_mode", "modules_to_save",
}  # fmt: skip


@pytest.fixture(scope="module")
def trained(made, tmp_path_factory):
    rows, base = made
    folder = tmp_path_factory.mktemp("alone")
    copy = shutil.copytree(base, folder / "base")
    (copy / "generation_config.json").write_text('{"eos_token_id": [1, 200], "repetition_penalty": 1.5}')
    given = {"base": str(copy), "out": folder / "run", "max_steps": 2, "examples_per_step": 4, "lr": 5e-3}
    return train(str(rows), **given).run, given, rows


def test_its_configuration_has_only_the_keys_that_a_plain_lora_needs(trained):
    run, given, _ = trained
    config = json.loads((run.adapter / "adapter_config.json").read_text())
    assert set(config) == OLD_KEYS
    assert config["base_model_name_or_path"] == given["base"]


def test_plain_peft_loads_it_and_the_tokenizer_beside_it_gives_the_golden_ids(trained):
    run, given, _ = trained
    base = AutoModelForCausalLM.from_pretrained(given["base"], dtype=torch.float32)
    PeftModel.from_pretrained(base, run.adapter)
    tokenizer = AutoTokenizer.from_pretrained(run.adapter)
    for golden in json.loads(run.template.read_text())["golden"]:
        rendered = tokenizer.apply_chat_template(golden["messages"], add_generation_prompt=True, return_dict=True)
        assert rendered["input_ids"] == golden["ids"]


def test_generation_ends_where_training_and_the_base_end(trained):
    run, _, _ = trained
    settings = GenerationConfig.from_pretrained(run.adapter)
    trained_stops = json.loads(run.template.read_text())["stop_ids"]
    assert settings.eos_token_id == list(dict.fromkeys([*trained_stops, 1, 200]))
    assert settings.repetition_penalty == 1.5


def test_the_card_and_lineage_say_where_it_comes_from(trained):
    run, given, _ = trained
    print_ = RunIdentity.read(run.identity).fingerprint
    lineage = json.loads((run.adapter / "lineage.json").read_text())
    assert lineage["base_sha256"] == print_.base and lineage["template_sha256"] == print_.template
    assert (lineage["train_rows"], lineage["held_out_rows"], lineage["steps"]) == (39, 1, 2)
    assert lineage["settings"]["lr"] == 5e-3 and lineage["versions"]["lorafit"]
    card = (run.adapter / "README.md").read_text()
    assert print_.train_rows[:16] in card and "39 rows of rows.jsonl" in card and given["base"] not in card


def test_it_names_a_base_that_has_moved(trained, tmp_path):
    run, given, rows = trained
    moved = shutil.copytree(given["base"], tmp_path / "elsewhere")
    copy = RunDir(shutil.copytree(run.path, tmp_path / "run"))
    with pytest.raises(RunFinished):
        train(str(rows), **{**given, "base": str(moved), "out": copy.path})
    config = json.loads((copy.adapter / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(moved)
    require_trained_run(copy)
