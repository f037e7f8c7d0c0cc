"""architecture: a checkpoint's configuration and tensors in the terms of llama.cpp.

Source: llama.cpp's convert_hf_to_gguf.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import gguf
import numpy as np

from lorafit.errors import UsageError
from lorafit.export.formats.gguf.families import FAMILIES
from lorafit.export.formats.gguf.fitting import full_context, require_fitting
from lorafit.export.formats.gguf.parts import Part, language_name, parts_of

CONVERTER = "merge to safetensors, and convert that folder with llama.cpp's convert_hf_to_gguf.py"


class Architecture:
    """Name tensors and settings of one model as llama.cpp does.

    Attributes:
        config: the transformers configuration of the language model.
        family: how llama.cpp stores it.
        tied: True if the embeddings are the head as well.
        layers: the number of decoder layers.
        head_dim: the size of a head.
        context: the tokens over which llama.cpp attends as the model does.
    """

    def __init__(self, config: Any) -> None:
        """Raise UsageError for a family that is not written here, or a setting that llama.cpp computes otherwise."""
        self.config = config.get_text_config()
        self._has_towers = self.config is not config
        if self.config.model_type not in FAMILIES:
            what = f"GGUF files of the family '{config.model_type!s:.40}' are not written here"
            raise UsageError(what, where="export_format", fix=CONVERTER)
        self.tied = bool(getattr(config, "tie_word_embeddings", False))
        self._deepstack = len(getattr(getattr(config, "vision_config", None), "deepstack_visual_indexes", ()))
        config = self.config
        self.family = FAMILIES[config.model_type]
        self.layers = int(config.num_hidden_layers)
        self.head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
        self._names = gguf.get_tensor_name_map(self.family.arch, self.layers)
        self.context = full_context(config)
        self._rope = _rope_of(config)
        require_fitting(config, self._rope, self.head_dim, tied=self.tied)

    @property
    def name(self) -> str:
        """Return llama.cpp's name of the architecture."""
        return gguf.MODEL_ARCH_NAMES[self.family.arch]

    @property
    def experts(self) -> int:
        """Return the number of experts of a layer; 0 for a dense model."""
        if self.family.scales_experts is None:
            return 0
        return int(getattr(self.config, "num_local_experts", None) or self.config.num_experts)

    def parts(self, name: str, values: np.ndarray) -> Iterator[Part]:
        """Yield the parts, by their names in the file, of the tensor `name` of the checkpoint; none for a tower's.

        `values` is fp32 in the checkpoint's shape. Raises UsageError for a tensor that llama.cpp has no place for.
        """
        plain = language_name(name) if self._has_towers else name
        if plain is None or (self.tied and plain == "lm_head.weight"):
            return
        whole = (Part(plain, values),)
        parts = parts_of(plain, values, self.family.experts, self.config.hidden_size) if self.experts else whole
        for part in parts:
            yield part._replace(name=self._stored(part.name), values=self._turned(part))

    def _stored(self, name: str) -> str:
        stored = self._names.get_name(name, (".weight", ".bias"))
        if stored is None:
            raise UsageError(f"llama.cpp has no place for the tensor '{name:.80}'", where="the base", fix=CONVERTER)
        return f"{stored}.weight" if stored.endswith("attn_sinks") else stored

    def _turned(self, part: Part) -> np.ndarray:
        """Return the values as the file has them: rotary pairs side by side, and what a norm multiplies by."""
        name, values, config = part.name, part.values, self.config
        if self.family.norm_plus_one and name.endswith("norm.weight"):
            return values + 1
        if self.family.permuted and name.endswith(("q_proj.weight", "q_proj.bias")):
            return _interleave(values, config.num_attention_heads)
        if self.family.permuted and name.endswith(("k_proj.weight", "k_proj.bias")):
            return _interleave(values, config.num_key_value_heads)
        return values

    def extra_tensors(self) -> dict[str, np.ndarray]:
        """Return tensors that the file has and the checkpoint has not: Llama 3's factors of rotary frequencies."""
        if self._rope.get("rope_type") != "llama3":
            return {}
        return {"rope_freqs.weight": _llama3_factors(self._rope, self.head_dim)}

    def write_settings(self, writer: gguf.GGUFWriter) -> None:
        """Add the sizes and constants of the model to `writer`."""
        config = self.config
        writer.add_block_count(self.layers)
        writer.add_context_length(self.context)
        writer.add_embedding_length(config.hidden_size)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_key_length(self.head_dim)
        writer.add_value_length(self.head_dim)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_vocab_size(config.vocab_size)
        self._write_rotary(writer)
        self._write_experts(writer)
        self._write_constants(writer)

    def _write_rotary(self, writer: gguf.GGUFWriter) -> None:
        rope = self._rope
        writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
        writer.add_rope_dimension_count(int(self.head_dim * rope.get("partial_rotary_factor", 1.0)))
        if rope.get("rope_type") in ("linear", "yarn"):
            kinds = {"linear": gguf.RopeScalingType.LINEAR, "yarn": gguf.RopeScalingType.YARN}
            writer.add_rope_scaling_type(kinds[rope["rope_type"]])
            writer.add_rope_scaling_factor(float(rope["factor"]))
        if rope.get("rope_type") == "yarn":
            original = rope.get("original_max_position_embeddings") or self.config.max_position_embeddings
            writer.add_rope_scaling_orig_ctx_len(int(original))
            writer.add_rope_scaling_attn_factors(_attention_factor(rope))

    def _write_experts(self, writer: gguf.GGUFWriter) -> None:
        """Add the sizes of a mixture."""
        config = self.config
        if not self.experts:
            return
        writer.add_expert_count(self.experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(
            getattr(config, "moe_intermediate_size", None) or config.intermediate_size
        )
        for name in ("shared_expert_intermediate_size", "shared_intermediate_size"):
            if width := getattr(config, name, 0):
                writer.add_expert_shared_feed_forward_length(width)

    def _write_constants(self, writer: gguf.GGUFWriter) -> None:
        """Add the constants of single families, where the configuration has them."""
        config, family = self.config, self.config.model_type
        if family in ("gemma2", "gemma3_text", "gpt_oss", "phi3"):
            writer.add_sliding_window(int(config.sliding_window or 0))
        if family == "phi3":
            original = getattr(config, "original_max_position_embeddings", None) or config.max_position_embeddings
            writer.add_rope_scaling_orig_ctx_len(int(original))
        if family == "gemma2":
            writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
            writer.add_final_logit_softcapping(config.final_logit_softcapping)
        if family == "gemma3_text":
            local = dict((getattr(config, "rope_parameters", None) or {}).get("sliding_attention") or {})
            writer.add_rope_freq_base_swa(
                float(local.get("rope_theta", getattr(config, "rope_local_base_freq", 10000.0)))
            )
            if config.final_logit_softcapping is not None:
                writer.add_final_logit_softcapping(config.final_logit_softcapping)
        if (axes := self._rope.get("mrope_section")) is not None or "_vl_" in family:
            half = self.head_dim // 2  # without towers every axis has the same positions
            writer.add_rope_dimension_sections([*(axes or (half, 0, 0)), 0])
        if family.startswith("qwen3_vl"):
            writer.add_num_deepstack_layers(self._deepstack)
        if family.startswith("granite"):
            writer.add_attention_scale(config.attention_multiplier)
            writer.add_embedding_scale(config.embedding_multiplier)
            writer.add_residual_scale(config.residual_multiplier)
            writer.add_logit_scale(config.logits_scaling)


def _rope_of(config: Any) -> dict[str, Any]:
    """Return the rotary settings of full attention, from transformers 5's or 4's configuration."""
    rope = dict(getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {})
    rope = dict(rope.get("full_attention") or rope)
    rope.setdefault("rope_type", rope.get("type", "default"))
    if (theta := getattr(config, "rope_theta", None)) is not None:
        rope.setdefault("rope_theta", theta)
    if (share := getattr(config, "partial_rotary_factor", None)) is not None:
        rope.setdefault("partial_rotary_factor", share)
    return rope


def _attention_factor(rope: dict[str, Any]) -> float:
    """Return what yarn scales attention by, over llama.cpp's own 0.1 ln(factor) + 1."""

    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(rope["factor"]) + 1.0 if rope["factor"] > 1 else 1.0

    wanted = rope.get("attention_factor")
    if wanted is None and rope.get("mscale") and rope.get("mscale_all_dim"):
        wanted = scale(rope["mscale"]) / scale(rope["mscale_all_dim"])
    return 1.0 if wanted is None else float(wanted) / scale(1.0)


def _interleave(values: np.ndarray, heads: int) -> np.ndarray:
    """Return the rows of each head with rotary pairs side by side: `LlamaModel.permute` of the converter."""
    split = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return np.ascontiguousarray(split.swapaxes(1, 2).reshape(values.shape))


def _llama3_factors(rope: dict[str, Any], head_dim: int) -> np.ndarray:
    """Return Llama 3's divisors of rotary frequencies (head_dim / 2,): `generate_extra_tensors` of the converter."""
    factor, original = float(rope["factor"]), float(rope["original_max_position_embeddings"])
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    frequencies = float(rope["rope_theta"]) ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    wavelengths = 2 * math.pi / frequencies
    smooth = (original / wavelengths - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    factors = np.where(wavelengths < original / high, 1.0, np.where(wavelengths > original / low, factor, between))
    return factors.astype(np.float32)
