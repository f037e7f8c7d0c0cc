"""families: how llama.cpp stores each family of models that is written here.

Source: llama.cpp's convert_hf_to_gguf.py, whose classes are named at each family, and its graphs in src/models.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import gguf

Layout = Literal["rows", "columns", "interleaved"]


@dataclass(frozen=True)
class Family:
    """Describe how llama.cpp stores a family.

    Attributes:
        arch: llama.cpp's name of the architecture.
        permuted: True if rotary pairs lie side by side in q and k, where transformers has them half a head apart.
        norm_plus_one: True if a norm multiplies by 1 + weight, and the file stores that sum.
        experts: how the checkpoint stores the fused gates and ups of its experts: one after another in `rows`; in
            `columns`, with inputs as rows; or as columns `interleaved`, one of each in turn.
        scales_experts: True if the weights of the chosen experts are divided by their sum; None without experts.
    """

    arch: gguf.MODEL_ARCH
    permuted: bool = False
    norm_plus_one: bool = False
    experts: Layout = "rows"
    scales_experts: bool | None = None


FAMILIES = {
    "llama": Family(gguf.MODEL_ARCH.LLAMA, permuted=True),  # LlamaModel
    "mistral": Family(gguf.MODEL_ARCH.LLAMA, permuted=True),
    "mixtral": Family(gguf.MODEL_ARCH.LLAMA, permuted=True, scales_experts=True),
    "granite": Family(gguf.MODEL_ARCH.GRANITE, permuted=True),  # GraniteModel(LlamaModel)
    "granitemoe": Family(gguf.MODEL_ARCH.GRANITE_MOE, permuted=True, scales_experts=True),  # GraniteMoeModel
    "granitemoeshared": Family(gguf.MODEL_ARCH.GRANITE_MOE, permuted=True, scales_experts=True),
    "smollm3": Family(gguf.MODEL_ARCH.SMOLLM3, permuted=True),  # SmolLM3Model(LlamaModel)
    "qwen2": Family(gguf.MODEL_ARCH.QWEN2),
    "qwen2_vl_text": Family(gguf.MODEL_ARCH.QWEN2VL),  # Qwen2VLModel
    "qwen2_5_vl_text": Family(gguf.MODEL_ARCH.QWEN2VL),
    "qwen2_moe": Family(gguf.MODEL_ARCH.QWEN2MOE, scales_experts=False),  # Qwen2MoeModel
    "qwen3": Family(gguf.MODEL_ARCH.QWEN3),
    "qwen3_vl_text": Family(gguf.MODEL_ARCH.QWEN3VL),  # Qwen3VLTextModel
    "qwen3_moe": Family(gguf.MODEL_ARCH.QWEN3MOE, scales_experts=True),  # Qwen3MoeModel
    "qwen3_vl_moe_text": Family(gguf.MODEL_ARCH.QWEN3VLMOE, experts="columns", scales_experts=True),
    "glm4": Family(gguf.MODEL_ARCH.GLM4),  # Glm4Model
    "olmo2": Family(gguf.MODEL_ARCH.OLMO2),
    "olmoe": Family(gguf.MODEL_ARCH.OLMOE, scales_experts=False),  # OlmoeModel
    "gpt_oss": Family(gguf.MODEL_ARCH.GPT_OSS, experts="interleaved", scales_experts=True),  # GptOssModel
    "phi3": Family(gguf.MODEL_ARCH.PHI3),
    "gemma": Family(gguf.MODEL_ARCH.GEMMA, norm_plus_one=True),
    "gemma2": Family(gguf.MODEL_ARCH.GEMMA2, norm_plus_one=True),
    "gemma3_text": Family(gguf.MODEL_ARCH.GEMMA3, norm_plus_one=True),
}
"""Families by the `model_type` of the language model. The tests compare each with transformers, logit by logit."""
