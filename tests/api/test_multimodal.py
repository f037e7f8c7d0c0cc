"""A vision-language base, trained on text: the language model is adapted, and everything else stays as it was."""

import json
import subprocess

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

import lorafit
from families_zoo import counted_here, small_config
from lorafit.api.observer import Observer
from lorafit.backbone import load_backbone
from lorafit.engine import PACKED
from tiny_models import save_tokenizer

PROCESSOR = {"processor_class": "Qwen2_5_VLProcessor", "image_processor_type": "Qwen2VLImageProcessor"}


SETTINGS = {"targets": "all-linear", "max_steps": 2, "lr": 0.02}


class Watch(Observer):
    """Keep the row mode of the run."""

    mode = None

    def on_model(self, counts, base, rows):
        Watch.mode = rows


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny Qwen2.5-VL in bf16, with a processor's files beside its tokenizer."""
    folder = tmp_path_factory.mktemp("multimodal") / "base"
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(small_config("qwen2_5_vl"))
    for weight in model.parameters():
        if weight.ndim >= 2:
            torch.nn.init.normal_(weight, std=0.08)
    model.to(torch.bfloat16).save_pretrained(folder)
    save_tokenizer(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    return folder


@pytest.fixture(scope="module")
def run(base):
    rows = base.parent / "rows.jsonl"
    rows.write_text(
        "".join(json.dumps({"instruction": f"say {n}", "response": "yes " * (1 + n % 4)}) + "\n" for n in range(20))
    )
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(subprocess, "run", counted_here(subprocess.run))
        return lorafit.train(rows, base=str(base), out=base.parent / "run", observer=Watch(), **SETTINGS)


def language(name):
    return ".language_model." in name or name == "lm_head.weight"


def test_its_rows_are_packed_with_their_positions_on_three_axes(run):
    assert Watch.mode == PACKED


def test_only_linears_of_the_language_model_are_quantized_and_adapted(run):
    model = load_backbone(run.resolved.config)
    quantized = {name for name, module in model.named_modules() if type(module).__name__ == "FrozenLinear4bit"}
    adapted = {
        key.split(".lora_")[0].removeprefix("base_model.model.")
        for key in load_file(next((run.run.path / "adapter").glob("*.safetensors")))
    }
    assert quantized == adapted and all(map(language, adapted))


def test_the_merged_folder_has_the_base_s_names_its_processor_and_its_vision_tower_bit_by_bit(run, base):
    merged = lorafit.merge(run.run.path)
    assert merged.passed
    before, after = load_file(base / "model.safetensors"), load_file(merged.folder / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        if "visual" in name or "norm" in name or "embed" in name:
            assert torch.equal(tensor, after[name]), name
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert json.loads((merged.folder / "preprocessor_config.json").read_text()) == PROCESSOR
    assert AutoModelForImageTextToText.from_pretrained(merged.folder).config.model_type == "qwen2_5_vl"


def test_transformers_class_for_images_takes_the_adapter(run, base, recwarn):
    plain = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    tuned = PeftModel.from_pretrained(plain, run.run.path / "adapter").eval()
    assert not [warning for warning in recwarn if "missing adapter keys" in str(warning.message)]
    ids = torch.arange(5, 45)[None]
    with torch.no_grad(), tuned.disable_adapter():
        before = tuned(input_ids=ids).logits
    with torch.no_grad():
        assert float((tuned(input_ids=ids).logits - before).norm() / before.norm()) > 1e-3


def test_it_answers_in_this_process(run):
    assert isinstance(lorafit.load(run.run.path).answer("say 3", max_new_tokens=4), str)
