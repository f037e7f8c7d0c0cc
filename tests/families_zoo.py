"""Tiny random configurations of every causal family of transformers: its own defaults, made small key by key."""

from __future__ import annotations

import contextlib
import io
import subprocess
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lorafit.backbone.skeleton import sizes
from lorafit.shapes import skeleton

VOCABULARY = 640
LAYERS = 4

SMALL: Mapping[int, tuple[str, ...]] = {
    64: ("hidden_size", "n_embd", "d_model", "dim", "embedding_size", "word_embed_proj_dim", "lru_width", "mamba_d_ssm",
         "attention_hidden_size", "output_hidden_size", "out_hidden_size"),
    96: ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "d_ff", "intermediate_size_mlp",
         "shared_intermediate_size", "block_ff_dim", "dense_intermediate_size", "prefix_dense_intermediate_size",
         "decoder_ffn_dim", "encoder_ffn_dim"),
    LAYERS: ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_experts", "num_local_experts",
             "n_routed_experts", "moe_num_experts", "num_attention_heads", "n_head", "n_heads", "num_heads",
             "num_attention_head", "linear_num_value_heads", "mamba_num_heads", "mamba_n_heads", "index_n_heads",
             "decoder_layers", "encoder_layers", "decoder_attention_heads", "encoder_attention_heads"),
    2: ("num_key_value_heads", "num_kv_heads", "n_head_kv", "num_experts_per_tok", "num_experts_per_token", "moe_topk",
        "moe_k", "top_k_experts", "linear_num_key_heads", "n_group", "mamba_n_groups", "n_groups"),
    16: ("head_dim", "kv_lora_rank", "v_head_dim", "linear_key_head_dim", "linear_value_head_dim", "mamba_d_state",
         "ssm_state_size", "state_size", "index_head_dim", "global_head_dim", "swa_head_dim", "d_kv",
         "attention_head_dim"),
    8: ("qk_rope_head_dim", "qk_nope_head_dim", "rotary_dim", "index_topk", "hidden_size_per_layer_input",
        "mamba_dt_rank", "time_step_rank", "swa_v_head_dim"),
    24: ("q_lora_rank",),
    32: ("moe_intermediate_size", "shared_expert_intermediate_size", "moe_shared_expert_intermediate_size",
         "expert_ffn_hidden_size", "mamba_head_dim", "mamba_d_head", "chunk_size", "mamba_chunk_size", "sliding_window",
         "attention_window_size"),
    128: ("attention_chunk_size",),
    VOCABULARY: ("vocab_size", "vocab_size_per_layer_input"),
    256: ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"),
    1: ("first_k_dense_replace", "n_shared_experts", "num_shared_experts", "topk_group", ),
}  # fmt: skip
VISION: Mapping[int, tuple[str, ...]] = {
    32: ("hidden_size", "embed_dim", "d_model", "output_dim", "projection_dim"),
    48: ("intermediate_size", "mlp_dim"),
    1: ("num_hidden_layers", "depth", "num_layers", "num_global_layers"),
    2: (
        "num_attention_heads",
        "num_heads",
        "attention_heads",
        "num_key_value_heads",
        "encoder_attention_heads",
        "encoder_layers",
    ),
    28: ("image_size",),
    14: ("patch_size",),
    64: ("out_hidden_size", "vision_output_dim", "projector_output_dim", "projector_input_dim"),
}
VALUE_OF = {key: value for value, keys in SMALL.items() for key in keys}
VISION_VALUE_OF = {key: value for value, keys in VISION.items() for key in keys}
TOKENS = {"pad_token_id": 2, "bos_token_id": 0, "eos_token_id": 1}
PATTERNS = ("layer_types", "layers_block_type", "hybrid_override_pattern", "attn_type_list", "layers_type",
            "mlp_layer_types",
            "attention_types", "no_rope_layers", "block_types", "moe_layer_freq", "mixer_types")  # fmt: skip

WRAPPERS = (
    "mistral3", "mistral4", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "glm4v", "glm4v_moe", "glm46v",
    "ernie4_5_vl_moe", "internvl", "llava", "llava_next", "llava_onevision", "idefics3", "smolvlm", "paligemma",
    "lfm2_vl", "aya_vision", "cohere2_vision", "granite4_vision", "kimi_k25", "nemotron_h_omni",
)  # fmt: skip

AXES = frozenset(
    "qwen2_vl qwen2_5_vl qwen3_vl qwen3_vl_moe glm4v glm4v_moe glm46v glm_ocr paddleocr_vl hunyuan_vl cosmos3_edge "
    "qwen3_5 qwen3_5_moe qwen4_exp qwen4_exp_text ernie4_5_vl_moe qwen2_5_omni_thinker qwen3_omni_moe_thinker "
    "glmga".split()
)
"""Families whose positions have three axes: time, height and width."""
QWEN4 = {"indexer_n_heads": LAYERS, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 16,
         "indexer_compress_ratio": 4, "ple_layer_ids": [1], "ple_embed_dim": 64, "ngram_vocab_size_base": 50,
         "number_of_conv_states": 3, "make_ngram_vocab_size_divisible_by": 16, "split_ngram_parts": 2, "hc_lowrank": 8,
         "eos_token_id": 1, "layer_types": ["linear_attention", "indexed_attention"] * 2}  # fmt: skip
NARROW = {"num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 16, "head_dim": 16,
          "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 16}  # fmt: skip
DOTS3 = {"index_topk": 64, "layer_types": ["indexed_attention", "sliding_attention"] * 2, "head_dim": 16,
         "shared_experts_intermediate_size": 32, "per_layer_config": {1: NARROW, 3: NARROW}}  # fmt: skip

GEMMA3N = {"num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2,
           "intermediate_size": [96] * 4, "activation_sparsity_pattern": [0.0] * 4}  # fmt: skip
TIMM = {"architecture": "vit_tiny_patch16_224", "model_args": {"embed_dim": 32, "depth": 1, "num_heads": 2}}
"""A small vision tower, for which transformers needs the package timm."""

OWN: dict[str, dict[str, Any]] = {
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
             "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 64}},
    "bamba": {"attn_layer_indices": [1, 3]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "n_group": 1, "topk_group": 1},
    "nemotron": {"num_key_value_heads": 2, "head_dim": 16},
    "gemma3n_text": GEMMA3N,
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 32},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 2},
    "minimax": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "kimi_linear": {"layer_types": ["linear_attention", "full_attention"] * 2, "linear_num_heads": 4,
                    "linear_head_dim": 16},
    "lfm3": {"layer_types": ["conv", "full_attention"] * 2},
    "whisper": {"decoder_attention_heads": 4, "decoder_layers": 2},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "bailing_hybrid": {"n_group": 2, "num_expert_group": 2, "topk_group": 1, "head_dim": 8,
                       "linear_head_dim": 8, "linear_num_heads": LAYERS},
    "deepseek_v4": {"head_dim": 32, "index_head_dim": 32, "partial_rotary_factor": 0.25, "qk_rope_head_dim": 8,
                    "rope_parameters": None, "num_key_value_heads": 1, "o_groups": 2, "o_lora_rank": 16,
                    "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
                    "layer_types": ["sliding_attention", "heavily_compressed_attention", "compressed_sparse_attention",
                                    "heavily_compressed_attention"],
                    "mlp_layer_types": ["hash_moe", "moe", "moe", "moe"]},
    "ernie4_5_vl_moe": {"text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0,
                                                            "mrope_section": [3, 3, 2]}}},
    "xlstm": {"hidden_size": 128, "embedding_dim": 128, "num_blocks": LAYERS},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "granite4_vision": {"deepstack_layer_map": [[0, 1]], "spatial_target_layers": [0, 1, 2, 3],
                        "vision_config": {"hidden_size": 64}, "downsample_rate": "1/2"},
    "mllama": {"architectures": ["MllamaForConditionalGeneration"]},
    "emu3": {"architectures": ["Emu3ForConditionalGeneration"],
             "vocabulary_map": {"<image>": 600, "<|visual token 000000|>": 601}},
    "hrm_text": {"num_layers_per_stack": 2, "num_hidden_layers": 16},  # 2 layers × 2 cycles × (3 inner + 1)
    "longcat_flash": {"qk_head_dim": 16},
    "zamba2": {"n_mamba_heads": 8, "mamba_headdim": 16, "attention_hidden_size": 128, "attention_head_dim": 32,
               "layers_block_type": ["mamba", "hybrid"] * 2, "hybrid_layer_ids": [1, 3]},
    "nemotron_h_omni": {},
    "reformer": {"is_decoder": True, "axial_pos_shape": [16, 16], "axial_pos_embds_dim": [32, 32],
                 "attn_layers": ["local", "lsh"] * 2},
    "xlnet": {"d_head": 16},
    "qwen2_5_omni_thinker": {"vision_start_token_id": 600, "vision_end_token_id": 601, "audio_start_token_id": 602,
                             "audio_end_token_id": 603},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 600},
    "inkling_mm_model": {"vision_config": {"n_layers": 2}},
    "kosmos-2.5": {"latent_query_num": 8, "text_config": {"layers": LAYERS, "embed_dim": 64, "attention_heads": 4}},
    "step3p7": {"text_config": {"sliding_window": 32, "num_sliding_attention_heads": 4, "share_expert_dim": 32,
                                "layer_types": ["sliding_attention", "full_attention"] * 2}},
    "zamba": {"attention_hidden_size": 128, "attention_head_dim": 32, "num_key_value_heads": LAYERS,
              "layers_block_type": ["linear_attention", "hybrid"] * 2},
    "glm5_next": {"text_config": {"num_key_value_heads": LAYERS, "linear_num_heads": LAYERS, "linear_head_dim": 16,
                                  "index_kpool": 4, "index_topk": 64, "qk_nope_head_dim": 16},
                  "vision_config": {"projection_intermediate_size": 64}},
    "mistral_large4": {"text_config": {"kv_source_layers": [0, 1, 0, 3]}},
    "qwen4_exp": {"text_config": QWEN4},
    "qwen4_exp_text": QWEN4,
    "dots3_note": {"text_config": DOTS3, "audio_config": {"adapter_input_size": 32, "adapter_out_dim": 64},
                   "vision_config": {"adapter_in_dim": 32, "adapter_out_dim": 64, "mlp_layer_types": ["sparse"],
                                     "per_layer_config": {0: {"num_local_experts": 4, "num_experts_per_tok": 2}},
                                     "moe_intermediate_size": 32}},
    "dots3_note_text": DOTS3,
    "inkling2": {"text_config": {"unpadded_vocab_size": VOCABULARY, "swa_num_attention_heads": LAYERS,
                                 "swa_num_key_value_heads": 2, "sliding_window_size": 32, "d_rel": 8},
                 "vision_config": {"text_hidden_size": 64, "projection_hidden_dim": 64}},
    "lfm3_vl": {"text_config": {"layer_types": ["conv", "full_attention"] * 2}, "projector_hidden_size": 64},
    "molmo2": {"vision_config": {"num_hidden_layers": 2}, "adapter_config": {"vision_feature_layer": [1, 0],
               "text_hidden_size": 64, "hidden_size": 32}},
    "muse_glimmer": {"out_hidden_size": 128, "projector_hidden_size": 64},
    "muse_spark": {"out_hidden_size": 128, "projector_hidden_size": 64, "text_config": {"moe_hidden_size": 32},
                   "audio_config": {"num_hidden_layers": 4, "hidden_sizes": [8, 8, 16, 32], "depths": [1] * 4,
                                    "out_hidden_size": 64}},
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
                                      "num_experts_per_tok": 2, "moe_intermediate_size": 32}},
    "diffusion_gemma": {"text_config": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32}},
    "gemma4_assistant": {"__init__": {"text_config": {"hidden_size_per_layer_input": 0,
                                                      "vocab_size_per_layer_input": 0}},
                         "text_config": {"num_kv_shared_layers": LAYERS}},
    "gemma4_unified_assistant": {"text_config": {"num_kv_shared_layers": LAYERS}},
    "fast_vlm": {"vision_config": TIMM},
    "perception_lm": {"vision_config": TIMM},
    "gemma3n": {"text_config": GEMMA3N, "vision_config": TIMM},
    "chameleon": {"vocabulary_map": {"<image>": 600, "IMGIMGA": 601}},
}  # fmt: skip
"""What single families need beside the general rules, by model type."""


def small_config(family: str) -> PretrainedConfig:
    """Return a configuration of `family` with at most a few million parameters."""
    own = dict(OWN.get(family, {}))
    model_type = own.pop("model_type", family)
    config_class = CONFIG_MAPPING[model_type]
    whole = config_class(**own.pop("__init__", {})).to_dict()
    raw = _shrunk(whole, VALUE_OF)
    text = raw.get("text_config") or raw
    if text.get("qk_rope_head_dim"):
        _set_latent(text, whole["text_config"] if "text_config" in raw else whole)
    if family in AXES:
        _set_axes(text)
    for key, value in own.items():
        raw[key] = raw[key] | value if isinstance(value, dict) and isinstance(raw.get(key), dict) else value
    raw.pop("model_type", None)
    return config_class(**raw)


def _set_latent(text: dict[str, Any], whole: Mapping[str, Any]) -> None:
    """Give latent attention a key for each head, and a head whose width follows from the rotated dimensions."""
    text["num_key_value_heads"] = text["num_attention_heads"]
    if whole.get("head_dim") == whole["qk_rope_head_dim"]:
        text["head_dim"] = text["qk_rope_head_dim"]
    else:
        text.pop("head_dim", None)


def _set_axes(text: dict[str, Any]) -> None:
    """Share half of a small head's rotated dimensions out to the three axes of positions."""
    rope = text.get("rope_parameters") or {}
    width = text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
    half = int(width * (rope.get("partial_rotary_factor") or text.get("partial_rotary_factor") or 1)) // 2
    text["rope_parameters"] = rope | {"mrope_section": [half - 2 * (half // 3), half // 3, half // 3]}


def families() -> list[str]:
    """Return every model type that has a causal language model in transformers, and the wrappers."""
    return [*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *(name for name in WRAPPERS if name in CONFIG_MAPPING)]


def counted_here(really_run: Callable[..., Any]) -> Callable[..., Any]:
    """Return `subprocess.run` with the skeleton's child in this process: a child takes seconds to import torch."""

    def run(command: Sequence[str], **options: Any) -> Any:
        if skeleton.CHILD not in command:
            return really_run(command, **options)
        with contextlib.redirect_stdout(io.StringIO()) as out:
            sizes.main(command[-1])
        return subprocess.CompletedProcess(list(command), 0, out.getvalue(), "")

    return run


def _shrunk(raw: dict[str, Any], values: Mapping[str, int]) -> dict[str, Any]:
    small: dict[str, Any] = {}
    layers = next((raw[key] for key in ("num_hidden_layers", "n_layer", "n_layers", "num_layers") if raw.get(key)), 0)
    for key, value in raw.items():
        if isinstance(value, dict) and key.endswith("_config") and key not in ("per_layer_config", "attn_config"):
            tower = any(part in key for part in ("vision", "audio", "speech", "vit", "vq"))
            small[key] = _shrunk(value, VISION_VALUE_OF if tower else VALUE_OF)
        elif key == "per_layer_config" and isinstance(value, dict):
            first = next(iter(value.values()), {})
            small[key] = {LAYERS - 1: _shrunk(first, values)} if value else {}
        elif isinstance(value, list | str) and (key in PATTERNS or _is_a_layer_each(value, layers)):
            small[key] = _mixed(value, key, 1 if values is VISION_VALUE_OF else LAYERS)
        elif key in values and isinstance(value, int) and not isinstance(value, bool):
            small[key] = min(value, values[key]) if value else value
        elif key in values and value is None and key == "head_dim":
            small[key] = values[key]
        elif key in TOKENS:
            small[key] = TOKENS[key]
        else:
            small[key] = value
    for key in ("architectures", "transformers_version", "dtype", "torch_dtype", "_name_or_path"):
        small.pop(key, None)
    return small


def _is_a_layer_each(value: Any, layers: int) -> bool:
    return isinstance(value, list) and layers > LAYERS and len(value) == layers


def _mixed(pattern: Any, key: str, count: int) -> Any:
    """Return `count` entries of `pattern`, every kind among them if that many fit."""
    value = VALUE_OF.get(key.removesuffix("_per_layer"))
    if isinstance(pattern, list) and isinstance(pattern[0], int) and not isinstance(pattern[0], bool) and value:
        return [min(entry, value) for entry in pattern[:count]]
    kinds = list(dict.fromkeys(map(str, pattern)))
    originals = {str(entry): entry for entry in pattern}
    chosen = [originals[kind] for kind in kinds]
    chosen = (chosen + list(pattern))[:count]
    if kinds and kinds[-1] not in map(str, chosen):
        chosen[-1] = originals[kinds[-1]]
    return "".join(chosen) if isinstance(pattern, str) else chosen
