"""Mixtures, and language models within models with towers, in GGUF files."""

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from lorafit.errors import UsageError, VerificationError
from lorafit.export import Row, format_named
from lorafit.export.formats import TransformersModel
from lorafit.export.formats.gguf.architecture import Architecture
from lorafit.export.formats.gguf.llama_cpp import LlamaCppModel
from lorafit.export.formats.gguf.lora_file import LowRank, write_lora
from lorafit.export.formats.gguf.parts import language_name, parts_of
from lorafit.export.formats.gguf.tensor_types import type_of
from tiny_gguf import FEW, MODELS, MOE, SIZES, WRAPPED, assert_computed_alike, companions, kl, model_of, wrapped

MIXTURES = [name for name, (_, extra) in MODELS.items() if "num_experts_per_tok" in extra]


def saved(model, folder):
    """The tensors of `model` as a checkpoint has them."""
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("family", [*MIXTURES, *WRAPPED])
def test_llama_cpp_computes_what_transformers_computes_of_a_checkpoints_tensors(family, tmp_path):
    model = wrapped(family) if family in WRAPPED else model_of(family)
    assert_computed_alike(model, saved(model, tmp_path / "checkpoint"), tmp_path)


def test_names_of_towers_are_left_out_and_those_of_the_language_model_are_one():
    for name in ("language_model.model.layers.0.x", "model.language_model.layers.0.x", "model.text_model.layers.0.x"):
        assert language_name(name) == "model.layers.0.x"
    assert language_name("language_model.lm_head.weight") == "lm_head.weight"
    for name in ("visual.blocks.0.x", "model.vision_tower.layers.0.x", "multi_modal_projector.linear.weight"):
        assert language_name(name) is None


def test_experts_have_the_same_parts_under_every_name_of_a_checkpoint():
    gate, up, down = (np.random.default_rng(0).random((4, *shape)) for shape in ((3, 5), (3, 5), (5, 3)))
    rows = np.concatenate((gate, up), 1)
    layer = "model.layers.1"
    wanted = {"gate_proj": gate, "up_proj": up, "down_proj": down}

    def found(weights, layout="rows"):
        parts = [part for name, values in weights.items() for part in parts_of(f"{layer}.{name}", values, layout, 5)]
        return {part.name.removeprefix(f"{layer}.mlp.experts."): part for part in parts}

    granite = {"input_linear": rows, "output_linear": down}
    for weights, layout in (
        ({f"block_sparse_moe.{name}.weight": values for name, values in granite.items()}, "rows"),
        ({"mlp.experts.gate_up_proj": rows, "mlp.experts.down_proj": down}, "rows"),
        ({"mlp.experts.gate_up_proj": rows, "mlp.experts.down_proj": down}, "columns"),
        ({"mlp.experts.gate_up_proj": rows.swapaxes(1, 2), "mlp.experts.down_proj": down.swapaxes(1, 2)}, "columns"),
    ):
        for name, part in found(weights, layout).items():
            assert part.expert is None
            np.testing.assert_array_equal(part.values, wanted[name.removesuffix(".weight")])
    biases = found({"mlp.experts.gate_up_proj_bias": np.arange(8.0).reshape(1, 8)}, "interleaved")
    assert biases["gate_proj.bias"].values.tolist() == [[0, 2, 4, 6]]
    assert {part.expert for part in found({"block_sparse_moe.experts.3.w3.weight": up[3]}).values()} == {3}


def test_a_base_that_lacks_an_expert_is_refused(tmp_path):
    model = model_of("mixtral")
    weights = saved(model, tmp_path / "checkpoint")
    companions(model, tmp_path)
    del weights["model.layers.2.block_sparse_moe.experts.3.w2.weight"]
    with pytest.raises(VerificationError, match=r"lacks 1 of 4 experts of blk\.2\.ffn_down_exps"):
        format_named("gguf-f16").write(weights.items(), tmp_path)


def test_the_types_of_a_mixture_are_llama_cpps():
    def kind(name, experts, quantization="q4_k_m", shape=(512, 512)):
        return type_of(f"blk.9.{name}.weight", shape, quantization, 32, False, experts).name

    assert kind("ffn_gate_inp", 8) == kind("ffn_gate_inp_shexp", 60) == "F32", "a router is not quantized"
    assert (kind("attn_k", 8), kind("attn_v", 8), kind("attn_output", 8)) == ("Q8_0", "Q8_0", "Q5_K")
    assert (kind("attn_k", 64), kind("attn_output", 64)) == ("Q4_K", "Q4_K")
    assert kind("ffn_down_exps", 64, shape=(64, 512, 512)) == kind("ffn_down", 0) == "Q6_K"
    assert kind("ffn_gate_exps", 64, "f16") == "F16"


REFUSED = {
    "weights that do not sum to 1": ("Qwen3Moe", MOE | {"norm_topk_prob": False}),
    r"weights that do sum to 1": ("Qwen2Moe", MOE | {"norm_topk_prob": True}),
    "layers are not all mixtures": ("Qwen3Moe", MOE | {"norm_topk_prob": True, "mlp_only_layers": [1]}),
    "keys have fewer heads": ("Olmoe", MOE),
    "clips queries": ("Olmoe", MOE | {"num_key_value_heads": 4, "clip_qkv": 8.0}),
    "attention has no biases": ("GptOss", FEW | {"attention_bias": False}),
    "not every second": ("GptOss", FEW | {"layer_types": ["full_attention"] * 3}),
    "head is tied": ("Qwen2Moe", MOE | {"norm_topk_prob": False, "tie_word_embeddings": True}),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_mixture_that_llama_cpp_computes_otherwise_is_refused(what):
    kind, extra = REFUSED[what]
    with pytest.raises(UsageError, match=what):
        Architecture(getattr(transformers, f"{kind}Config")(**(SIZES | extra)))


def test_llama_cpp_adds_a_lora_file_over_a_mixture(tmp_path):
    model = model_of("mixtral")
    companions(model, tmp_path)
    form = format_named("gguf-f16")
    form.write(model.state_dict().items(), tmp_path)
    draw = np.random.default_rng(0).standard_normal
    pairs = {
        f"model.layers.{layer}.self_attn.q_proj.weight": LowRank(
            *(draw(shape, dtype=np.float32) * 0.3 for shape in ((2, 64), (64, 2))), 2.0
        )
        for layer in range(3)
    }
    write_lora(pairs.items(), tmp_path, tmp_path / "lora.gguf")
    with torch.no_grad():
        for weight, (a, b, scale) in pairs.items():
            model.get_parameter(weight).add_(torch.from_numpy(b @ a) * scale)
    row = Row(np.random.default_rng(1).integers(5, 1000, 60).astype(np.int32), np.ones(60, bool))
    with LlamaCppModel.load(tmp_path / form.file, tmp_path / "lora.gguf") as opened:
        assert kl(opened.log_probabilities(row), TransformersModel(model).log_probabilities(row)) < 1e-5
