"""Parameters of published models, counted from their sizes: within 1 % of what their makers state."""

import subprocess

import pytest

from families_zoo import counted_here
from lorafit.shapes import ModelShape


def sizes(layers, hidden, heads, kv_heads, inner, vocabulary, head_dim=128, **more):
    """The keys of config.json that most models have."""
    return {
        "num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": heads, "intermediate_size": inner,
        "num_key_value_heads": kv_heads, "vocab_size": vocabulary, "head_dim": head_dim, "tie_word_embeddings": False,
        **more,
    }  # fmt: skip


TIED = {"tie_word_embeddings": True}
SCOUT = {"num_local_experts": 16, "intermediate_size_mlp": 16384, "interleave_moe_layer_step": 1}
MAVERICK = SCOUT | {"num_local_experts": 128, "interleave_moe_layer_step": 2}
EXPERTS_128 = {"num_experts": 128, "num_experts_per_tok": 8}
IN_THE_TABLE = {
    "Llama-3.2-1B": ("llama", sizes(16, 2048, 32, 8, 8192, 128256, 64, **TIED), 1.236),
    "Qwen3-0.6B": ("qwen3", sizes(28, 1024, 16, 8, 3072, 151936, **TIED), 0.596),
    "Qwen3-8B": ("qwen3", sizes(36, 4096, 32, 8, 12288, 151936), 8.191),
    "Qwen3-30B-A3B": (
        "qwen3_moe", sizes(48, 2048, 32, 4, 6144, 151936, moe_intermediate_size=768, **EXPERTS_128), 30.53,
    ),
    "Qwen3-235B-A22B": (
        "qwen3_moe", sizes(94, 4096, 64, 4, 12288, 151936, moe_intermediate_size=1536, **EXPERTS_128), 235.1,
    ),
    "gpt-oss-20b": ("gpt_oss", sizes(24, 2880, 64, 8, 2880, 201088, 64, num_local_experts=32), 20.91),
    "gpt-oss-120b": ("gpt_oss", sizes(36, 2880, 64, 8, 2880, 201088, 64, num_local_experts=128), 116.8),
    "Llama-4-Scout, text": ("llama4_text", sizes(48, 5120, 40, 8, 8192, 202048, **SCOUT), 107.8),
    "Llama-4-Maverick, text": ("llama4_text", sizes(48, 5120, 40, 8, 8192, 202048, **MAVERICK), 400.7),
    "gemma-3-1b": ("gemma3_text", sizes(26, 1152, 4, 1, 6912, 262144, 256, **TIED), 1.000),
    "gemma-3-27b, text": ("gemma3_text", sizes(62, 5376, 32, 16, 21504, 262208, **TIED), 27.01),
    "phi-4": ("phi3", sizes(40, 5120, 40, 10, 17920, 100352), 14.66),
    "OLMo-2-32B": ("olmo2", sizes(64, 5120, 40, 8, 27648, 100352), 32.23),
    "SmolLM3-3B": ("smollm3", sizes(36, 2048, 16, 4, 11008, 128256, **TIED), 3.075),
    "Mistral-Small-24B": ("mistral", sizes(40, 5120, 32, 8, 32768, 131072), 23.57),
    "Mixtral-8x7B": ("mixtral", sizes(32, 4096, 32, 8, 14336, 32000, num_local_experts=8), 46.70),
    "granite-3.3-8b": ("granite", sizes(40, 4096, 32, 8, 12800, 49159, **TIED), 8.17),
}  # fmt: skip
GEMMA_VISION = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16,
                "image_size": 896, "patch_size": 14}  # fmt: skip
GEMMA_12B = {"model_type": "gemma3_text"} | sizes(48, 3840, 16, 8, 15360, 262208, 256, **TIED)
COUNTED = {
    "Qwen3-Next-80B-A3B": ("qwen3_next", {}, 79.67),
    "MiniMax-M2": ("minimax_m2", {}, 228.7),
    "gemma-3-12b with its tower": ("gemma3", {"text_config": GEMMA_12B, "vision_config": GEMMA_VISION}, 12.19),
}
"""Counted by transformers; a family without sizes has its first model's as defaults."""


@pytest.mark.parametrize("name", [*IN_THE_TABLE, *COUNTED])
def test_a_published_model_has_as_many_parameters_as_its_makers_state(name, monkeypatch):
    monkeypatch.setattr(subprocess, "run", counted_here(subprocess.run))
    family, config, billions = {**IN_THE_TABLE, **COUNTED}[name]
    shape = ModelShape.from_config({"model_type": family, **config}, name)
    assert shape.counted == (name in COUNTED)
    assert shape.parameters == pytest.approx(billions * 1e9, rel=0.01)
