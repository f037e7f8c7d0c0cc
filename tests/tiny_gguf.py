"""Tiny random models of the families that are written to GGUF, and what lies beside a file."""

import json
import shutil

import numpy as np
import torch
import torch.nn.functional as F
import transformers

from families_zoo import AXES, small_config
from lorafit.backbone.architecture import auto_class
from lorafit.demo import BASE
from lorafit.export import Row, format_named
from lorafit.export.formats import TransformersModel

SIZES = {
    "vocab_size": 1024, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 1024, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
ROPE = {"rope_theta": 10000.0}
LLAMA3 = ROPE | {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
GEMMA = {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 32}
GRANITE = {
    "attention_multiplier": 0.2, "embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 2.0,
}  # fmt: skip
FEW = {"num_local_experts": 4, "num_experts_per_tok": 2}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
MODELS = {
    "llama": ("Llama", {}),
    "llama, tied, biased, narrow heads": (
        "Llama", {"tie_word_embeddings": True, "attention_bias": True, "head_dim": 8}),
    "llama 3 rotary": ("Llama", {"rope_parameters": LLAMA3}),
    "linear rotary": ("Llama", {"rope_parameters": ROPE | {"rope_type": "linear", "factor": 2.0}}),
    "yarn": ("Llama", {"rope_parameters": ROPE | {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}}),
    "yarn, scaled": ("Qwen3", {"rope_parameters": ROPE | {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "attention_factor": 0.7}}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "granite": ("Granite", GRANITE),
    "smollm3": ("SmolLM3", {"num_hidden_layers": 4}),
    "olmo2": ("Olmo2", {}),
    "phi3": ("Phi3", {}),
    "glm4": ("Glm4", {"attention_bias": True, "head_dim": 32}),
    "gemma": ("Gemma", {"head_dim": 32}),
    "gemma2": ("Gemma2", GEMMA),
    "gemma3": ("Gemma3Text", GEMMA | {
        "num_hidden_layers": 7, "final_logit_softcapping": 3.0, "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 500.0}}}),
    "mixtral": ("Mixtral", FEW),
    "qwen2_moe": ("Qwen2Moe", MOE | {"norm_topk_prob": False, "shared_expert_intermediate_size": 80}),
    "qwen3_moe": ("Qwen3Moe", MOE | {"norm_topk_prob": True, "head_dim": 32}),
    "olmoe": ("Olmoe", MOE | {"num_key_value_heads": 4}),
    "granitemoe": ("GraniteMoe", FEW | GRANITE),
    "granitemoeshared": ("GraniteMoeShared", FEW | GRANITE | {"shared_intermediate_size": 80}),
    "gpt_oss": ("GptOss", FEW | {
        "head_dim": 32, "sliding_window": 32, "num_hidden_layers": 4, "rope_parameters": ROPE,
        "layer_types": ["sliding_attention", "full_attention"] * 2}),
}  # fmt: skip
WRAPPED = {
    "gemma3": GEMMA,
    "mistral3": {"sliding_window": None},
    "qwen2_vl": {},
    "qwen2_5_vl": {},
    "qwen3_vl": {"head_dim": 32, "num_hidden_layers": 4},  # of which the towers reach three
    "qwen3_vl_moe": MOE | {"head_dim": 32, "num_hidden_layers": 4},
}
"""Settings of the language models of families with towers."""


def model_of(name, **sizes):
    """A random model with norms and biases away from 1 and 0, so that a lost one is seen."""
    kind, extra = MODELS[name]
    config = getattr(transformers, f"{kind}Config")(**(SIZES | extra | sizes))
    return randomized(getattr(transformers, f"{kind.removesuffix('Text')}ForCausalLM"), config)


def wrapped(family):
    """A random model with towers."""
    config = small_config(family)
    text = config.text_config
    for key, value in (SIZES | WRAPPED[family]).items():
        setattr(text, key, value)
    text.layer_types = ["full_attention"] * text.num_hidden_layers
    if family == "gemma3":
        text.layer_types = ["sliding_attention"] * text.num_hidden_layers
    if family in AXES:
        half = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        third = half // 6
        text.rope_parameters = ROPE | {"rope_type": "default", "mrope_section": [half // 2 - 2 * third, third, third]}
    return randomized(auto_class(config)._model_mapping[type(config)], config)


def randomized(kind, config):
    torch.manual_seed(0)
    model = kind(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.1) if weight.ndim == 1 else weight.mul_(3)
    return model


def companions(model, folder):
    model.config.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BASE / name, folder / name)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 5]}))


def kl(theirs, ours):
    return float(F.kl_div(theirs, ours, reduction="batchmean", log_target=True))


def assert_computed_alike(model, weights, folder):
    """Write `weights` of `model` to a GGUF file in `folder`, and hold llama.cpp's probabilities against the model's."""
    companions(model, folder)
    form = format_named("gguf-f16")
    form.write(weights.items(), folder)
    row = Row(np.random.default_rng(0).integers(5, 1000, 100).astype(np.int32), np.ones(100, bool))
    ours = TransformersModel(model).log_probabilities(row)
    with form.open(folder, torch.device("cpu"), torch.float32) as opened:
        theirs = opened.log_probabilities(row)
    assert kl(theirs, ours) < 1e-5
    assert kl(theirs.roll(1, 0), ours) > 1e-3, "positions differ, so that the comparison can fail"
