"""architecture: a checkpoint's configuration and tensors in the terms of llama.cpp.

Source: llama.cpp's convert_hf_to_gguf.py, whose classes are named at each family.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import gguf
import numpy as np

from lorafit.errors import UsageError
from lorafit.export.formats.gguf.fitting import full_context, require_fitting

CONVERTER = "merge to safetensors, and convert that folder with llama.cpp's convert_hf_to_gguf.py"


@dataclass(frozen=True)
class Family:
    """Describe how llama.cpp stores a family.

    Attributes:
        arch: llama.cpp's name of the architecture.
        permuted: True if rotary pairs lie side by side in q and k, where transformers has them half a head apart.
        norm_plus_one: True if a norm multiplies by 1 + weight, and the file stores that sum.
    """

    arch: gguf.MODEL_ARCH
    permuted: bool = False
    norm_plus_one: bool = False


FAMILIES = {
    "llama": Family(gguf.MODEL_ARCH.LLAMA, permuted=True),  # LlamaModel
    "mistral": Family(gguf.MODEL_ARCH.LLAMA, permuted=True),
    "granite": Family(gguf.MODEL_ARCH.GRANITE, permuted=True),  # GraniteModel(LlamaModel)
    "smollm3": Family(gguf.MODEL_ARCH.SMOLLM3, permuted=True),  # SmolLM3Model(LlamaModel)
    "qwen2": Family(gguf.MODEL_ARCH.QWEN2),
    "qwen3": Family(gguf.MODEL_ARCH.QWEN3),
    "olmo2": Family(gguf.MODEL_ARCH.OLMO2),
    "phi3": Family(gguf.MODEL_ARCH.PHI3),
    "gemma2": Family(gguf.MODEL_ARCH.GEMMA2, norm_plus_one=True),
    "gemma3_text": Family(gguf.MODEL_ARCH.GEMMA3, norm_plus_one=True),
}
"""Families by `model_type`. Each is compared with transformers, logit by logit, in the tests."""


class Architecture:
    """Name tensors and settings of one model as llama.cpp does.

    Attributes:
        config: the transformers configuration.
        family: how llama.cpp stores it.
        layers: the number of decoder layers.
        head_dim: the size of a head.
    """

    def __init__(self, config: Any) -> None:
        """Raise UsageError for a family that is not written here, or a setting that llama.cpp computes otherwise."""
        if config.model_type not in FAMILIES:
            what = f"GGUF files of the family '{config.model_type!s:.40}' are not written here"
            raise UsageError(what, where="export_format", fix=CONVERTER)
        self.config = config
        self.family = FAMILIES[config.model_type]
        self.layers = int(config.num_hidden_layers)
        self.head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
        self._names = gguf.get_tensor_name_map(self.family.arch, self.layers)
        self._rope = _rope_of(config)
        require_fitting(config, self._rope, self.head_dim)

    @property
    def name(self) -> str:
        """Return llama.cpp's name of the architecture."""
        return gguf.MODEL_ARCH_NAMES[self.family.arch]

    def tensor(self, name: str, values: np.ndarray) -> tuple[str, np.ndarray]:
        """Return (name in the file, values in the file) of a tensor of the checkpoint.

        `values` is fp32 in the checkpoint's shape. Raises UsageError for a tensor that llama.cpp has no place for.
        """
        stored = self._names.get_name(name, (".weight", ".bias"))
        if stored is None:
            raise UsageError(f"llama.cpp has no place for the tensor '{name:.80}'", where="the base", fix=CONVERTER)
        if self.family.norm_plus_one and name.endswith("norm.weight"):
            return stored, values + 1
        if self.family.permuted and name.endswith(("q_proj.weight", "q_proj.bias")):
            return stored, _interleave(values, self.config.num_attention_heads)
        if self.family.permuted and name.endswith(("k_proj.weight", "k_proj.bias")):
            return stored, _interleave(values, self.config.num_key_value_heads)
        return stored, values

    def extra_tensors(self) -> dict[str, np.ndarray]:
        """Return tensors that the file has and the checkpoint has not: Llama 3's factors of rotary frequencies."""
        if self._rope.get("rope_type") != "llama3":
            return {}
        return {"rope_freqs.weight": _llama3_factors(self._rope, self.head_dim)}

    def write_settings(self, writer: gguf.GGUFWriter) -> None:
        """Add the sizes and constants of the model to `writer`."""
        config = self.config
        writer.add_block_count(self.layers)
        writer.add_context_length(full_context(config))
        writer.add_embedding_length(config.hidden_size)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_key_length(self.head_dim)
        writer.add_value_length(self.head_dim)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_vocab_size(config.vocab_size)
        self._write_rotary(writer)
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

    def _write_constants(self, writer: gguf.GGUFWriter) -> None:
        """Add the constants of single families, where the configuration has them."""
        config, family = self.config, self.config.model_type
        if family in ("gemma2", "gemma3_text", "phi3"):
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
        if family == "granite":
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
