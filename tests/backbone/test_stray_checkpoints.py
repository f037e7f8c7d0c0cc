"""A folder that is no plain base says what it is, and its fix works."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorafit.backbone.base_checkpoint import Checkpoint, base_damages
from lorafit.config import base_folder, resolve, served_stop_ids
from lorafit.errors import BackboneError, UsageError
from lorafit.shapes import ModelShape
from lorafit.shapes.dimensions import quantization_of


@pytest.fixture
def base(tmp_path):
    from tiny_models import save_base

    folder = save_base(tmp_path / "base")
    tensors = {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
    for path in [*folder.glob("*.safetensors"), folder / "model.safetensors.index.json"]:
        path.unlink(missing_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder, tensors


def test_tensors_of_an_unmerged_adapter_are_refused(base):
    folder, tensors = base
    name = "model.layers.0.self_attn.q_proj.weight"
    parts = ("lora_A.default.weight", "lora_up.weight", "lora_down.weight", "lora_E", "ranknum", "lora.up.weight",
             "base_layer.weight", "lokr_w1", "boft_R", "vera_lambda_b", "hra_u", "vblora_logits_A")  # fmt: skip
    strays = [name.replace("weight", part) for part in parts]
    strays += ["model.embed_tokens.modules_to_save.default.weight", f"base_model.model.{name}", f"base_model.{name}"]
    strays += ["lora_A.weight", "lora_unet_down.alpha", "prompt_embeddings"]
    for stray in strays:
        save_file(
            {**tensors, stray: tensors[name][:2].clone()}, folder / "model.safetensors", metadata={"format": "pt"}
        )
        with pytest.raises(BackboneError, match=r"an unmerged adapter lies in the base \(1 tensors"):
            Checkpoint.open(folder)
    save_file({**tensors, f"model.{name}": tensors[name].clone()}, folder / "model.safetensors")
    with pytest.raises(BackboneError, match=r"model\.model\.layers.* lies in the base beside model\.layers"):
        Checkpoint.open(folder)


@pytest.mark.parametrize(("file", "method"), [("quantize_config.json", "gptq"), ("quant_config.json", "awq")])
def test_packed_weights_are_called_quantized_without_a_word_of_it_in_config_json(base, file, method):
    folder, tensors = base
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[name.replace("weight", "qweight")] = tensors.pop(name)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BackboneError, match=r"already quantized \(1 packed tensors, .*choose the base's 16-bit"):
        Checkpoint.open(folder)
    assert ModelShape.from_base(str(folder)).quantized is None
    (folder / file).write_text("{}")
    assert ModelShape.from_base(str(folder)).quantized == method


def test_weights_of_few_bits_without_their_scales_are_refused(base):
    folder, tensors = base
    for kind, name in ((torch.int8, "I8"), (torch.float8_e4m3fn, "F8_E4M3")):
        stored = {key: tensor.to(kind) if key.endswith("q_proj.weight") else tensor for key, tensor in tensors.items()}
        save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(BackboneError, match=f"q_proj.weight is stored in {name}, and config.json does not say"):
            Checkpoint.open(folder)
    settings = json.loads((folder / "config.json").read_text())
    assert quantization_of(settings | {"quantization_config": "int4"}) == "int4"


def test_shards_without_their_index_are_called_that(base):
    folder, _ = base
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    with pytest.raises(BackboneError, match=r"has shards .*00001-of-00002.* no model\.safetensors\.index\.json"):
        Checkpoint.open(folder)


def test_weights_under_the_name_of_a_variant_open_once_renamed(base):
    folder, tensors = base
    (folder / "model.safetensors").rename(folder / "model.fp16.safetensors")
    with pytest.raises(BackboneError, match=r"rename model\.fp16\.safetensors to model\.safetensors"):
        Checkpoint.open(folder)
    (folder / "model.fp16.safetensors").rename(folder / "model.safetensors")
    assert Checkpoint.open(folder).names() == set(tensors)


def test_an_adapter_as_base_is_called_one(tmp_path):
    for config, base in (("{}", "ITS_BASE"), ('{"base_model_name_or_path": "org/base"}', "org/base")):
        (tmp_path / "adapter_config.json").write_text(config)
        with pytest.raises(BackboneError, match=f"adapter, not a base; .*--base {base} --set init_adapter="):
            base_folder(str(tmp_path))


def test_a_run_a_gguf_file_and_weights_alone_are_called_what_they_are(tmp_path):
    run = tmp_path / "run"
    for name in ("adapter", "checkpoints/step-000004"):
        (run / name).mkdir(parents=True)
    (run / "run.yaml").write_text("")
    (run / "fingerprint.json").write_text("{}")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "model.safetensors").write_bytes(b"")
    said = {run: "a run of lorafit, not a base; merge it first with 'lorafit merge", tmp_path / "model.gguf": "GGUF",
            run / "checkpoints" / "step-000004": "lorafit merge .*run'", tmp_path: "GGUF",
            tmp_path / "alone": "weights but no config", tmp_path / "none": "not a folder"}  # fmt: skip
    for place, words in said.items():
        with pytest.raises(BackboneError, match=words):
            base_folder(str(place))


WRONG = {
    "eos_token_id": ([10**30], ["1"], [None], [1.0], True, "1"), "pad_token_id": ([0], "x"),
    "repetition_penalty": (0, -1.0, "hot"), "temperature": (float("nan"), "hot"),
}  # fmt: skip


def test_generation_settings_that_no_answer_can_follow_are_refused_before_training(base):
    folder, _ = base
    path = folder / "generation_config.json"
    for settings in [json.dumps({key: value}) for key, values in WRONG.items() for value in values] + ["[1]"]:
        path.write_text(settings)
        assert [str(path)] == [damage.where for damage in base_damages(folder)], settings
    path.write_text('{"eos_token_id": [-1, 1, 1, 99999999], "pad_token_id": -1, "own": {}, "temperature": 0}')
    assert base_damages(folder) == []
    assert served_stop_ids([1], folder) == (1, 99999999)


@pytest.mark.parametrize("name", ["a\0b", "a\udcff"])
def test_a_path_that_not_every_library_opens_is_refused(name):
    for key in ("base", "out", "init_adapter"):
        with pytest.raises(UsageError, match="another name"):
            resolve(flags={key: name})


@pytest.mark.parametrize(("given", "kept"), [("none", ()), ("all", ("all",)), ("none,tensorboard", ("tensorboard",))])
def test_no_tracker_is_none(given, kept):
    assert resolve(flags={"report_to": given}).config.report_to == kept
