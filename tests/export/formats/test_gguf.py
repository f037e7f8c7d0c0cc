"""A GGUF file, opened by llama.cpp itself, is the model that transformers runs."""

import json

import gguf
import numpy as np
import pytest
import torch
import transformers

from lorafit.api.merge import merge as measured_merge
from lorafit.demo import BASE
from lorafit.errors import UsageError, VerificationError
from lorafit.export import Row, format_named
from lorafit.export.formats import TransformersModel
from lorafit.export.formats.gguf.architecture import Architecture
from lorafit.export.formats.gguf.fitting import full_context
from lorafit.export.formats.gguf.gguf_format import BITS, Gguf
from lorafit.export.formats.gguf.llama_cpp import LlamaCppModel, quantize_rows
from lorafit.export.formats.gguf.lora_file import LowRank, write_lora
from lorafit.export.formats.gguf.tensor_types import encode, type_of
from lorafit.export.formats.gguf.vocabulary import SPLITS, pre_tokenizer
from lorafit.export.importance import input_squares
from lorafit.export.merge import merge
from tiny_gguf import GEMMA, LLAMA3, MODELS, ROPE, SIZES, assert_computed_alike, companions, kl, model_of


@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_computes_what_transformers_computes(name, tmp_path):
    model = model_of(name)
    assert_computed_alike(model, model.state_dict(), tmp_path)


def test_a_row_longer_than_one_call_of_llama_cpp_has_the_same_probabilities(tmp_path):
    model = model_of("qwen2")
    companions(model, tmp_path)
    form = format_named("gguf-f16")
    form.write(model.state_dict().items(), tmp_path)
    row = Row(np.random.default_rng(0).integers(5, 1000, 700).astype(np.int32), np.arange(700) >= 500)
    with form.open(tmp_path, torch.device("cpu"), torch.float32) as opened:
        assert kl(opened.log_probabilities(row), TransformersModel(model).log_probabilities(row)) < 1e-5


def test_each_quantization_is_smaller_and_farther_than_the_one_before(tmp_path):
    model = model_of("llama", hidden_size=256, intermediate_size=512, num_hidden_layers=4)
    row = Row(np.random.default_rng(0).integers(5, 1000, 60).astype(np.int32), np.ones(60, bool))
    ours = TransformersModel(model).log_probabilities(row)
    sizes, distances = [], []
    for quantization in ("f16", "q8_0", "q6_k", "q5_k_m", "q4_k_m"):
        folder = tmp_path / quantization
        folder.mkdir()
        companions(model, folder)
        sizes.append(Gguf(quantization).write(model.state_dict().items(), folder).total_bytes)
        with Gguf(quantization).open(folder, torch.device("cpu"), torch.float32) as opened:
            distances.append(kl(opened.log_probabilities(row), ours))
        assert sizes[-1] <= BITS[quantization] / 8 * sum(w.numel() for w in model.parameters()) * 1.1
    assert sizes == sorted(sizes, reverse=True)
    assert distances == sorted(distances)
    assert distances[0] < 1e-5 < distances[1]


def test_k_quants_mix_types_as_llama_cpp_does():
    q4 = {n: type_of(f"blk.{n}.ffn_down.weight", (512, 512), "q4_k_m", 32, False).name for n in range(32)}
    assert [n for n, kind in q4.items() if kind == "Q6_K"] == [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]
    assert type_of("output.weight", (1000, 512), "q4_k_m", 32, False).name == "Q6_K"
    assert type_of("token_embd.weight", (1000, 512), "q4_k_m", 32, True).name == "Q6_K", "a tied head is the output"
    assert type_of("token_embd.weight", (1000, 512), "q4_k_m", 32, False).name == "Q4_K"
    assert type_of("blk.9.ffn_gate.weight", (512, 704), "q4_k_m", 32, False).name == "Q5_0", "256 does not divide 704"
    assert type_of("blk.9.attn_norm.weight", (512,), "q4_k_m", 32, False).name == "F32"


def test_rows_quantized_by_llama_cpp_are_near_the_rows():
    values = np.random.default_rng(0).standard_normal((8, 512), dtype=np.float32)
    for kind, most in ((gguf.GGMLQuantizationType.Q4_K, 0.09), (gguf.GGMLQuantizationType.Q6_K, 0.025)):
        back = gguf.quants.dequantize(quantize_rows(values, kind), kind)
        assert 0 < np.sqrt(np.mean((back - values) ** 2)) < most


def test_columns_that_count_are_rounded_less():
    values = np.random.default_rng(0).standard_normal((8, 512), dtype=np.float32)
    importance = np.where(np.arange(512) % 2, 100.0, 0.01).astype(np.float32)
    for kind in (gguf.GGMLQuantizationType.Q4_K, gguf.GGMLQuantizationType.Q5_0):
        plain, weighed = (
            np.abs(gguf.quants.dequantize(encode(values, kind, given), kind) - values) for given in (None, importance)
        )
        assert weighed[:, 1::2].mean() < plain[:, 1::2].mean()


def test_importance_is_the_mean_square_of_the_inputs_at_the_predicting_positions():
    model = model_of("llama")
    ids = np.random.default_rng(0).integers(5, 1000, 30).astype(np.int32)
    row = Row(ids, np.arange(30) >= 20)
    squares = input_squares(model, [row, row])
    assert set(squares) == {f"{n}.weight" for n, part in model.named_modules() if isinstance(part, torch.nn.Linear)}
    hidden = model.model(torch.from_numpy(ids.astype(np.int64))[None]).last_hidden_state[0, 19:29]
    np.testing.assert_allclose(squares["lm_head.weight"], hidden.detach().square().mean(0), rtol=1e-4)
    embedded = model.model.embed_tokens(torch.from_numpy(ids[19:29].astype(np.int64)))
    wanted = model.model.layers[0].input_layernorm(embedded).detach().square().mean(0)
    np.testing.assert_allclose(squares["model.layers.0.self_attn.k_proj.weight"], wanted, rtol=1e-4)


def test_a_merged_run_becomes_a_file_with_its_tokenizer_stops_and_template(make_run, tmp_path, jinja):
    run = make_run(tmp_path, chat_template=jinja, quantization="none", tokenizer=BASE, overrides={"vocab_size": 1024})
    report = merge(run.path, export_format=format_named("gguf-f16"))
    assert report.findings == () and report.shards == 1
    fields = gguf.GGUFReader(report.folder / "model-F16.gguf").fields
    assert fields["tokenizer.chat_template"].contents().endswith(jinja)
    assert fields["general.sampling.temp"].contents() == 0.0
    stops = json.loads((report.folder / "generation_config.json").read_text())["eos_token_id"]
    assert fields["tokenizer.ggml.eos_token_id"].contents() == stops[0]
    assert not [path.name for path in report.folder.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("name", ["llama, tied, biased, narrow heads", "phi3", "qwen3"])
def test_llama_cpp_adds_a_lora_file_as_the_sum_is_added(name, tmp_path):
    model = model_of(name)
    companions(model, tmp_path)
    form = format_named("gguf-f16")
    form.write(model.state_dict().items(), tmp_path)
    linears = {
        f"{name}.weight": part for name, part in model.model.named_modules(prefix="model") if hasattr(part, "bias")
    }
    draw = np.random.default_rng(0).standard_normal
    pairs = {
        weight: LowRank(
            *(draw(shape, dtype=np.float32) * 0.1 for shape in ((rank, part.in_features), (part.out_features, rank))),
            2.0,
        )
        for rank, (weight, part) in zip((2, 4) * len(linears), linears.items())
    }  # of two ranks, which llama.cpp divides its alpha by
    assert len(pairs) >= 12
    write_lora(pairs.items(), tmp_path, tmp_path / "lora.gguf")
    row = Row(np.random.default_rng(1).integers(5, 1000, 60).astype(np.int32), np.ones(60, bool))
    without = TransformersModel(model).log_probabilities(row)
    with torch.no_grad():
        for weight, (a, b, scale) in pairs.items():
            linears[weight].weight += torch.from_numpy(b @ a) * scale
    with LlamaCppModel.load(tmp_path / form.file, tmp_path / "lora.gguf") as opened:
        theirs = opened.log_probabilities(row)
    assert kl(theirs, TransformersModel(model).log_probabilities(row)) < 1e-5
    assert kl(theirs, without) > 1e-2


def test_a_tied_head_has_no_lora_file(tmp_path):
    model = model_of("qwen2", tie_word_embeddings=True)
    companions(model, tmp_path)
    zeros = LowRank(np.zeros((2, 64), np.float32), np.zeros((1024, 2), np.float32), 1.0)
    with pytest.raises(UsageError, match="no head that shares its weights"):
        write_lora([("lm_head.weight", zeros)], tmp_path, tmp_path / "lora.gguf")
    assert not (tmp_path / "lora.gguf").exists()


def test_another_tokenization_in_the_serving_program_is_an_error(make_run, tmp_path, jinja, monkeypatch):
    run = make_run(tmp_path, chat_template=jinja, quantization="none", tokenizer=BASE, overrides={"vocab_size": 1024})
    monkeypatch.setattr(LlamaCppModel, "tokenize", lambda self, text: [7, 8])
    (finding,) = merge(run.path, export_format=format_named("gguf-f16")).findings
    assert (finding.code, finding.severity) == ("V002", "error")
    assert "from token 0" in finding.message


def test_a_family_without_a_place_is_refused_with_the_way_out(tmp_path):
    transformers.GPTNeoXConfig(hidden_size=32, num_attention_heads=2, num_hidden_layers=1).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="GGUF files of the family 'gpt_neox' are not written here") as caught:
        format_named("gguf-f16").write({}.items(), tmp_path)
    assert "convert_hf_to_gguf.py" in str(caught.value.fix)


YARN = ROPE | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
REFUSED = {
    "rotary scaling is 'dynamic'": ("Llama", {"rope_parameters": ROPE | {"rope_type": "dynamic", "factor": 2.0}}),
    "rotary scaling is 'llama3'": ("Qwen3", {"rope_parameters": LLAMA3}),
    "yarn has the betas 16 and 1": ("Llama", {"rope_parameters": YARN | {"beta_fast": 16}}),
    "yarn is not truncated": ("Llama", {"rope_parameters": YARN | {"truncate": False}}),
    "rotary embedding is partial": ("Granite", {"rope_parameters": ROPE | {"partial_rotary_factor": 0.5}}),
    "activation is 'gelu'": ("Llama", {"hidden_act": "gelu"}),
    "attention has biases": ("Qwen3", {"attention_bias": True}),
    "feed-forward layer has biases": ("SmolLM3", {"mlp_bias": True}),
    "head is tied": ("Olmo2", {"tie_word_embeddings": True}),
    "head is not tied": ("Gemma2", GEMMA | {"tie_word_embeddings": False}),
    "heads have 40 columns, not 16": ("Qwen2", {"head_dim": 40}),
    "without rotary embedding are not every fourth": ("SmolLM3", {"no_rope_layer_interval": 3}),
    "attention is scaled by 100": ("Gemma3Text", GEMMA | {"query_pre_attn_scalar": 100}),
    "not every second": ("Gemma2", GEMMA | {"layer_types": ["full_attention"] * 3}),
    "attention is bidirectional": ("Gemma3Text", GEMMA | {"use_bidirectional_attention": True}),
    "logits are capped at None": ("Gemma2", GEMMA | {"attn_logit_softcapping": None}),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_a_setting_that_llama_cpp_computes_otherwise_is_refused(what):
    kind, extra = REFUSED[what]
    with pytest.raises(UsageError, match=what):
        Architecture(getattr(transformers, f"{kind}Config")(**(SIZES | extra)))


def test_the_context_ends_with_a_window_that_llama_cpp_does_not_know():
    def context(kind, **extra):
        return full_context(getattr(transformers, f"{kind}Config")(**(SIZES | extra)))

    assert context("Mistral", sliding_window=32) == context("Phi3", sliding_window=32) == 32
    assert context("Qwen2", use_sliding_window=True, sliding_window=32, max_window_layers=1) == 32
    assert context("Mistral", sliding_window=None) == context("Qwen2", sliding_window=32) == 1024
    assert context("Gemma2", **GEMMA) == 1024


def test_a_row_beyond_the_window_is_refused_before_anything_is_measured(tmp_path):
    transformers.MistralConfig(**(SIZES | {"sliding_window": 32})).save_pretrained(tmp_path)
    rows = [Row(np.arange(length, dtype=np.int32), np.ones(length, bool)) for length in (20, 33)]
    form = format_named("gguf-f16")
    form.require_rows(tmp_path, rows[:1])
    with pytest.raises(UsageError, match=r"rows of 33 tokens, and llama\.cpp attends as the model does up to 32"):
        form.require_rows(tmp_path, rows)


def test_a_base_is_refused_before_anything_is_measured(make_run, tmp_path, jinja, monkeypatch):
    odd = {"vocab_size": 1024, "hidden_act": "gelu"}
    run = make_run(tmp_path, chat_template=jinja, quantization="none", tokenizer=BASE, overrides=odd)
    monkeypatch.setattr("lorafit.api.merge.verification_rows", lambda *_: pytest.fail("measured"))
    with pytest.raises(UsageError, match="activation is 'gelu'"):
        measured_merge(run.path, export_format="gguf-f16")
    (run.base / "config.json").write_text((BASE / "config.json").read_text())
    format_named("gguf-f16").require_base(run.base)
    tokenizer = json.loads((run.base / "tokenizer.json").read_text())
    (run.base / "tokenizer.json").write_text(json.dumps(tokenizer | {"model": {"type": "WordPiece"}}))
    with pytest.raises(UsageError, match="a tokenizer of the kind 'WordPiece'"):
        format_named("gguf-f16").require_base(run.base)


def test_a_missing_package_is_named_with_its_command(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="gguf-q4_k_m needs the packages gguf and xllamacpp") as caught:
        format_named("gguf-q4_k_m").write({}.items(), tmp_path)
    assert caught.value.fix == "pip install gguf xllamacpp"


def test_a_damaged_file_is_refused_without_llama_cpps_own_lines(tmp_path, capfd):
    (tmp_path / "model-F16.gguf").write_bytes(b"GGUF" + bytes(60))
    with (
        pytest.raises(VerificationError, match=r"llama\.cpp does not load the file"),
        format_named("gguf-f16").open(tmp_path, torch.device("cpu"), torch.float32),
    ):
        pass
    assert capfd.readouterr() == ("", "")


def split_by(pattern, **model):
    steps = [{"type": "Split", "pattern": {"Regex": pattern}}, {"type": "ByteLevel", "use_regex": False}]
    return {"pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}, "model": model}


def test_the_structure_of_a_tokenizer_names_llama_cpps_pre_tokenizer():
    llama3 = next(pattern for pattern, name in SPLITS.items() if name == "llama-bpe")
    assert pre_tokenizer(split_by(llama3, ignore_merges=True)) == "llama-bpe"
    assert pre_tokenizer(split_by(llama3)) == "dbrx", "the same splits, and merges from single bytes on"
    assert pre_tokenizer(split_by(llama3.replace("{1,3}", ""))) == "qwen2"
    assert pre_tokenizer({"pre_tokenizer": {"type": "ByteLevel", "use_regex": True}, "model": {}}) == "gpt-2"
    with pytest.raises(UsageError, match=r"pre-tokenizer \(Split \+ ByteLevel\) is not known"):
        pre_tokenizer(split_by(r"\w+"))
