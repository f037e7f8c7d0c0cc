import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from lorafit.backbone import base_fingerprint, dequantize, load_backbone
from lorafit.config import RunConfig
from lorafit.data.template.template import Template
from lorafit.data.tokenizer.tokenizer import TextTokenizer
from lorafit.errors import BackboneError, RunDirError, VerificationError
from lorafit.export import merge
from lorafit.export.companions import merged_config
from lorafit.export.formats import Safetensors
from lorafit.methods.lora import Deltas, load_adapter
from tiny_models import some_ids

SPLIT = ["llama", "llama-tied", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "gemma3", "mixtral", "qwen3_moe"]
FUSED = {"phi3": ("qkv_proj",), "gpt_neox": ("query_key_value",)}


def tensors_in(folder: Path):
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def test_every_weight_is_the_live_one_plus_its_delta_rounded_once(trained, tmp_path):
    report = merge(trained.path, out=tmp_path / "out")
    live = trained.live.get_base_model()
    deltas = Deltas.from_folder(trained.run.adapter)
    merged = tensors_in(report.folder)
    modules = dict(live.named_modules())
    for name, tensor in merged.items():
        module = modules[name.removesuffix(".weight").replace("_proj", "_proj.base_layer")
                         if name in deltas else name.removesuffix(".weight")]  # fmt: skip
        packed = hasattr(module, "compute_dtype")
        weight = dequantize(module, torch.float32) if packed else module.weight
        expected = weight + deltas[name].dense() if name in deltas else weight
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, expected.to(torch.bfloat16)), name
    assert report.merged_weights == 4 and report.onto == "quantized" and report.findings == ()


def test_the_original_gets_the_delta_over_the_checkpoint_as_stored(trained, tmp_path):
    report = merge(trained.path, onto="original", out=tmp_path / "out")
    stored = tensors_in(trained.base)
    deltas = Deltas.from_folder(trained.run.adapter)
    for name, tensor in tensors_in(report.folder).items():
        expected = stored[name].float() + deltas[name].dense() if name in deltas else stored[name]
        assert torch.equal(tensor, expected.to(torch.bfloat16)), name


@pytest.mark.parametrize("onto", ["quantized", "original"])
@pytest.mark.parametrize("family", [*SPLIT, *FUSED])
def test_each_familys_artefact_answers_as_the_adapter_over_that_base(make_run, tmp_path, family, onto):
    run = make_run(tmp_path, family, targets=FUSED.get(family, "qv"))
    report = merge(run.path, onto=onto)
    assert report.folder == run.path / "exports" / f"merged-{onto}"
    merged, info = AutoModelForCausalLM.from_pretrained(report.folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ids = some_ids()
    over_original = load_backbone(run.config.model_copy(update={"quantization": "none"}))
    live = run.live if onto == "quantized" else load_adapter(over_original, run.run.adapter)
    expected = live(ids).logits.log_softmax(-1)
    with live.disable_adapter():
        base = live(ids).logits.log_softmax(-1)
    near = (expected.exp() * (expected - merged(ids).logits.log_softmax(-1))).sum(-1).mean()
    far = (expected.exp() * (expected - base)).sum(-1).mean()
    assert near < 0.02 * far, (near, far)


def test_biases_and_tied_heads_come_through(make_run, tmp_path):
    run = make_run(tmp_path, "qwen2", overrides={"tie_word_embeddings": True})
    merged = AutoModelForCausalLM.from_pretrained(merge(run.path).folder, dtype=torch.bfloat16)
    base = AutoModelForCausalLM.from_pretrained(run.base, dtype=torch.bfloat16)
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert torch.equal(merged.lm_head.weight, base.lm_head.weight)
    bias = merged.model.layers[1].self_attn.q_proj.bias
    assert bias.abs().sum() > 0 and torch.equal(bias, base.model.layers[1].self_attn.q_proj.bias)


def test_shards_are_bounded_and_indexed(trained, tmp_path):
    report = merge(trained.path, out=tmp_path / "out", export_format=Safetensors(max_shard_bytes=40_000))
    files = sorted(report.folder.glob("*.safetensors"))
    assert len(files) == report.shards > 2
    index = json.loads((report.folder / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(tensors_in(report.folder))
    assert index["metadata"]["total_size"] == report.total_bytes
    for path in files:
        tensors = load_file(path)
        assert sum(t.nbytes for t in tensors.values()) <= 40_000 or len(tensors) == 1
        assert {index["weight_map"][name] for name in tensors} == {path.name}
    AutoModelForCausalLM.from_pretrained(report.folder)


def test_a_small_model_is_one_file_without_an_index(trained, tmp_path):
    folder = merge(trained.path, out=tmp_path / "out").folder
    assert [path.name for path in folder.glob("*.safetensors*")] == ["model.safetensors"]


def test_merging_twice_gives_the_same_bytes(trained, tmp_path):
    first, second = (merge(trained.path, out=tmp_path / name).folder for name in "ab")
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes(), path.name


@pytest.mark.parametrize(
    ("given", "named"), [({}, "bfloat16"), ({"dtype": "fp16"}, "float16"), ({"onto": "original"}, "float32")]
)
def test_the_config_is_the_bases_without_quantisation_and_in_the_dtype_of_the_weights(make_run, tmp_path, given, named):
    run = make_run(tmp_path, dtype=torch.float32)
    folder = merge(run.path, **given).folder
    config, base = (json.loads((each / "config.json").read_text()) for each in (folder, run.base))
    assert config["dtype"] == named and base["dtype"] == "float32"
    assert {k: v for k, v in config.items() if k != "dtype"} == {k: v for k, v in base.items() if k != "dtype"}
    assert {tensor.dtype for tensor in tensors_in(folder).values()} == {getattr(torch, named)}


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_onto_the_original_untouched_tensors_keep_their_bits(make_run, tmp_path, dtype):
    run = make_run(tmp_path, dtype=dtype)
    stored, merged = tensors_in(run.base), tensors_in(merge(run.path, onto="original").folder)
    changed = {name for name, tensor in merged.items() if not torch.equal(tensor, stored[name])}
    assert changed == set(Deltas.from_folder(run.run.adapter)) and len(changed) == 4
    assert {tensor.dtype for tensor in merged.values()} == {dtype}


def test_nested_configs_lose_their_dtype_and_quantisation_too():
    nested = {
        "torch_dtype": "float16",
        "quantization_config": {},
        "auto_map": {},
        "text_config": {"dtype": "float16", "a": 1},
    }
    assert merged_config(nested, torch.bfloat16) == {"dtype": "bfloat16", "text_config": {"dtype": "bfloat16", "a": 1}}


@pytest.mark.parametrize("own", [7, [7, 2, 9]])
def test_generation_stops_where_training_stopped_and_where_the_base_stops(trained, tmp_path, own):
    (trained.base / "generation_config.json").write_text(json.dumps({"temperature": 0.6, "eos_token_id": own}))
    folder = merge(trained.path, out=tmp_path / "out").folder
    stops = [2, 7] if own == 7 else [2, 7, 9]
    assert json.loads((folder / "generation_config.json").read_text()) == {"temperature": 0.6, "eos_token_id": stops}
    assert AutoModelForCausalLM.from_pretrained(folder).generation_config.eos_token_id == stops


@pytest.mark.parametrize(
    "own", [None, {"do_sample": True, "repetition_penalty": 1.5, "max_length": 77, "pad_token_id": 5}]
)
def test_the_bases_generation_settings_survive_but_for_the_stops(trained, tmp_path, own):
    path = trained.base / "generation_config.json"
    path.unlink(missing_ok=True)
    if own is not None:
        path.write_text(json.dumps(own))
    folder = merge(trained.path, out=tmp_path / "out").folder
    merged, base = (
        AutoModelForCausalLM.from_pretrained(each).generation_config.to_diff_dict() for each in (folder, trained.base)
    )
    base.pop("_from_model_config", None)
    assert {**merged, "eos_token_id": 0} == {**base, "eos_token_id": 0}


@pytest.mark.parametrize("own_template", [False, True])
def test_transformers_renders_the_trained_prompt(make_run, tmp_path, jinja, own_template):
    run = make_run(tmp_path, chat_template=jinja if own_template else None)
    report = merge(run.path)
    assert report.findings == ()
    golden = json.loads(run.run.template.read_text())["golden"]
    assert len(golden) >= 2
    tokenizer = AutoTokenizer.from_pretrained(report.folder)
    for each in golden:
        rendered = tokenizer.apply_chat_template(each["messages"], add_generation_prompt=True, return_dict=True)
        assert rendered["input_ids"] == each["ids"]


def test_a_template_that_trims_nothing_is_exported_so_that_it_trims_as_training_did(make_run, tmp_path, jinja):
    run = make_run(tmp_path, chat_template=jinja)
    report = merge(run.path)
    template = Template.load(run.run.template, TextTokenizer.from_base(run.config.base))
    tokenizer = AutoTokenizer.from_pretrained(report.folder)
    messages = [
        {"role": "user", "content": "a\r\nb \n"},
        {"role": "assistant", "content": None, "tool_calls": []},
        {"role": "user", "content": " c\n\n"},
    ]
    found = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert found == template.prompt_text(messages)
    assert (report.folder / "chat_template.jinja").read_text().endswith(jinja)


def test_the_pipeline_answers_and_uses_the_trained_prompt(trained, tmp_path):
    folder = merge(trained.path, out=tmp_path / "out").folder
    answer = pipeline("text-generation", model=str(folder), device="cpu")
    text = answer([{"role": "user", "content": "Hi"}], max_new_tokens=4, do_sample=False)[0]["generated_text"]
    assert text[-1]["role"] == "assistant"


def test_a_template_that_transformers_renders_otherwise_is_finding_v001(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "lorafit.data.template.template.Template.jinja_for_export", property(lambda _: "{{ messages[0]['content'] }}")
    )
    (finding,) = merge(trained.path, out=tmp_path / "out").findings
    assert finding.code == "V001" and finding.severity == "error" and finding.fix and finding.why


def test_a_chat_template_that_fails_in_transformers_is_v001_too(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "lorafit.data.template.template.Template.jinja_for_export", property(lambda _: "{{ nothing.here.at }}")
    )
    (finding,) = merge(trained.path, out=tmp_path / "out").findings
    assert finding.code == "V001" and "UndefinedError" in finding.message


def test_a_broken_generation_config_is_one_sentence(make_run, tmp_path):
    run = make_run(tmp_path)
    (run.base / "generation_config.json").write_text("{")
    with pytest.raises(BackboneError, match=r"generation_config\.json"):
        merge(run.path)
    assert not (run.path / "exports" / "merged-quantized").exists()


def test_licences_go_along_and_the_gpu_names_the_base(trained, tmp_path):
    (trained.base / "LICENSE.txt").write_text("be nice")
    folder = merge(trained.path, out=tmp_path / "out").folder
    assert (folder / "LICENSE.txt").read_text() == "be nice"
    gpu = (folder / "README.md").read_text()
    assert "rank 4" in gpu and str(trained.base.parent) not in gpu


def test_nothing_is_written_where_something_already_is(trained, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(RunDirError, match="already exists"):
        merge(trained.path, out=tmp_path / "out")


def test_a_full_disk_is_known_before_anything_is_written(trained, tmp_path, monkeypatch):
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(10, 9, 1))
    with pytest.raises(RunDirError, match="GB"):
        merge(trained.path, out=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_half_way_leaves_nothing(trained, tmp_path, monkeypatch):
    def disk_full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lorafit.export.formats.safetensors.save_file", disk_full)
    with pytest.raises(RunDirError, match="No space left"):
        merge(trained.path, out=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_another_base_than_the_trained_one_is_refused(trained, tmp_path):
    fingerprint = base_fingerprint(trained.base)
    merge(trained.path, out=tmp_path / "out", fingerprint=fingerprint)
    with pytest.raises(VerificationError, match="has changed"):
        merge(trained.path, out=tmp_path / "other", fingerprint="0" * 64)
    assert not (tmp_path / "other").exists()


def test_an_untrained_adapter_is_refused(make_run, tmp_path):
    run = make_run(tmp_path, std=0.0)
    with pytest.raises(VerificationError, match="not trained"):
        merge(run.path)
    assert not (run.path / "exports").exists()


def test_a_folder_that_is_no_run_is_one_sentence(tmp_path):
    with pytest.raises(RunDirError):
        merge(tmp_path / "nothing")


def test_a_tampered_template_is_refused(make_run, tmp_path):
    run = make_run(tmp_path)
    saved = json.loads(run.run.template.read_text())
    run.run.template.write_text(json.dumps(saved | {"jinja": "{{ 'x' }}"}))
    with pytest.raises(RunDirError, match=r"template\.json: the file has changed since training"):
        merge(run.path)


def test_a_run_over_an_unquantised_base_merges_onto_the_original(make_run, tmp_path):
    run = make_run(tmp_path, quantization="none")
    report = merge(run.path)
    assert report.onto == "original" and report.folder.name == "merged-original"


def test_a_prequantised_base_has_no_original_to_merge_onto(make_run, tmp_path):
    run = make_run(tmp_path)
    load_backbone(run.config).save_pretrained(tmp_path / "packed")
    for path in run.base.glob("*token*"):
        (tmp_path / "packed" / path.name).write_bytes(path.read_bytes())
    config = run.config.model_copy(update={"base": str(tmp_path / "packed")})
    run.run.write_config(config, dict.fromkeys(RunConfig.model_fields, "default"))
    report = merge(run.path)
    config = json.loads((report.folder / "config.json").read_text())
    assert "quantization_config" not in config
    again = AutoModelForCausalLM.from_pretrained(report.folder, dtype=torch.float32)(some_ids()).logits
    torch.testing.assert_close(again, run.live(some_ids()).logits, rtol=0, atol=0.1)
    with pytest.raises(BackboneError, match="4 bits only"):
        merge(run.path, onto="original")
