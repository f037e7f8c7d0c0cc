"""The table of families against transformers' own models, built on the meta device: every family, every variant."""

from collections import Counter

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from lorafit.shapes import ModelShape
from lorafit.shapes.families import FAMILIES

SMALL = {
    "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 128, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48,
    "shared_expert_intermediate_size": 80, "intermediate_size_mlp": 112,
}  # fmt: skip
ONE_KEY_A_HEAD = {key: value for key, value in SMALL.items() if key not in ("num_key_value_heads", "head_dim")}
OLD_NAMES = {"n_embd": 96, "n_layer": 3, "n_head": 6, "vocab_size": 128, "n_positions": 32, "hidden_size": 96}
SIZES = {
    "gpt2": OLD_NAMES,
    "gpt_bigcode": OLD_NAMES,
    "gptj": OLD_NAMES | {"rotary_dim": 8},
    "bloom": OLD_NAMES,
    "mpt": {"d_model": 96, "n_layers": 3, "n_heads": 6, "vocab_size": 128},
    "opt": ONE_KEY_A_HEAD | {"ffn_dim": 160, "word_embed_proj_dim": 96, "max_position_embeddings": 32},
    "falcon": ONE_KEY_A_HEAD | {"ffn_hidden_size": 160},
    "gpt_neox": ONE_KEY_A_HEAD,
    "ministral": SMALL | {"sliding_window": 8},
}
VARIANTS = {
    "llama": [{"attention_bias": True, "mlp_bias": True}, {"tie_word_embeddings": True}],
    "cohere": [{"use_qk_norm": True}],
    "stablelm": [{"use_parallel_residual": True}, {"qk_layernorm": True, "use_qkv_bias": True}],
    "falcon": [
        {"new_decoder_architecture": True, "num_kv_heads": 2},
        {"multi_query": False, "bias": True, "parallel_attn": False},
    ],
    "phi": [{"qk_layernorm": True}],
    "gpt_bigcode": [{"multi_query": False}],
    "gpt_neox": [{"attention_bias": False}],
    "qwen2_moe": [{"decoder_sparse_step": 2}, {"mlp_only_layers": [0]}],
    "qwen3_moe": [{"mlp_only_layers": [0, 2]}],
    "llama4_text": [{"interleave_moe_layer_step": 2}],
    "gemma": [{"tie_word_embeddings": False}],
}
CASES = [(family, change) for family in FAMILIES for change in [{}, *VARIANTS.get(family, [])]]


def built(family, change):
    config = CONFIG_MAPPING[family](**{**SIZES.get(family, SMALL), **change})
    with torch.device("meta"):
        return config, AutoModelForCausalLM.from_config(config)


def linear_sizes(model):
    """(name, inputs, outputs) of every linear but the head, and how many of each."""
    sizes = Counter()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and module is not model.get_output_embeddings():
            sizes[name.rpartition(".")[2], module.in_features, module.out_features] += 1
        elif isinstance(module, Conv1D):
            sizes[name.rpartition(".")[2], module.nx, module.nf] += 1
    return sizes


@pytest.mark.parametrize(("family", "change"), CASES, ids=lambda value: str(value) if value else "")
def test_shape_counts_what_transformers_builds(family, change):
    config, model = built(family, change)
    shape = ModelShape.from_config(config.to_dict(), family)
    tables = [module.weight for module in model.modules() if isinstance(module, torch.nn.Embedding)]
    embeddings = {id(weight): weight.numel() for weight in tables}
    head = model.get_output_embeddings()
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert shape.embedding_parameters == sum(embeddings.values())
    assert shape.head_parameters == (0 if id(head.weight) in embeddings else head.weight.numel())
    ours = Counter()
    for linear in shape.linears:
        ours[linear.name, linear.inputs, linear.outputs] += linear.count
    assert ours == linear_sizes(model)


def test_a_family_has_one_module_for_each_path():
    for family, row in FAMILIES.items():
        paths = [part.path for part in row.parts if part.layers != "dense"]
        assert len(paths) == len(set(paths)), family
