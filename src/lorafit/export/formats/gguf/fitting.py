"""fitting: settings of a model that llama.cpp computes otherwise, or has no place for.

Each rule is that of llama.cpp's graph of the family, and was seen to differ on random models. A file that ignored such
a setting would load, and agree with the run on short rows at best.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lorafit.errors import UsageError
from lorafit.export.formats.gguf.families import FAMILIES

OTHERWISE = "serve it with transformers or vLLM instead: lorafit export RUN --to merged"
GEMMAS = ("gemma2", "gemma3_text")
WINDOWED = (*GEMMAS, "gpt_oss")
"""Families whose sliding windows llama.cpp knows."""
LLAMAS = ("llama", "mistral", "mixtral", "granite", "granitemoe", "granitemoeshared")
"""Families whose graph takes biases, a head apart from its embeddings, and factors of rotary frequencies."""
OWN_HEAD_DIM = (
    *LLAMAS, "qwen3", "qwen3_moe", "qwen3_vl_text", "qwen3_vl_moe_text", "smollm3", "gpt_oss", "glm4", "gemma", *GEMMAS,
)  # fmt: skip
BIASED = (*LLAMAS, "qwen2", "qwen2_vl_text", "qwen2_5_vl_text", "qwen2_moe", "gpt_oss", "glm4", "phi3")
UNTIED = ("olmo2", "olmoe", "qwen2_moe", "gpt_oss")
"""Families that need a head of their own."""
LARGEST = {"gemma2": 46, "gemma3_text": 62}
"""Layers of the 27B models, which scale their attention by another size."""
ROTARY = ("default", "linear", "yarn", "llama3")


def require_fitting(config: Any, rope: dict[str, Any], head_dim: int, *, tied: bool) -> None:
    """Raise UsageError for the first setting of `config` that llama.cpp would compute otherwise.

    `tied` is True if the embeddings are the head as well.
    """
    rules = (
        *_of_rope(config.model_type, rope),
        *_of_layers(config, head_dim, tied),
        *_of_experts(config),
        *_of_attention(config, head_dim),
    )
    for what in rules:
        sentence = f"the model's {what}, which a GGUF file written here cannot say"
        raise UsageError(sentence, where="config.json", fix=OTHERWISE)


def full_context(config: Any) -> int:
    """Return the tokens over which llama.cpp attends as the model does.

    It attends to everything in families that it knows without a window: they agree up to the window's length.
    """
    context, window = int(config.max_position_embeddings), getattr(config, "sliding_window", None)
    if config.model_type in WINDOWED or not window or not _has_window(config):
        return context
    return min(context, int(window))


def _has_window(config: Any) -> bool:
    kinds = getattr(config, "layer_types", None)
    return kinds is None or "sliding_attention" in kinds


def _of_rope(family: str, rope: dict[str, Any]) -> Iterator[str]:
    kind = rope.get("rope_type", "default")
    if kind not in ROTARY:
        yield f"rotary scaling is '{kind!s:.40}'"
    if kind == "llama3" and family not in LLAMAS:
        yield "rotary scaling is 'llama3'"
    if kind == "yarn" and rope.get("truncate") is False and family != "gpt_oss":  # whose KL it changes by 1e-6
        yield "yarn is not truncated"
    betas = (rope.get("beta_fast") or 32, rope.get("beta_slow") or 1)
    if kind == "yarn" and betas != (32, 1):
        yield f"yarn has the betas {betas[0]} and {betas[1]}, not 32 and 1"
    if rope.get("partial_rotary_factor", 1.0) != 1.0 and family not in ("phi3", "glm4"):
        yield f"rotary embedding is partial ({rope['partial_rotary_factor']})"


def _of_layers(config: Any, head_dim: int, tied: bool) -> Iterator[str]:
    family = config.model_type
    wanted = "gelu_pytorch_tanh" if family in ("gemma", *GEMMAS) else "silu"
    name = "hidden_activation" if family in GEMMAS else "hidden_act"
    if (given := getattr(config, name, wanted)) != wanted:
        yield f"activation is '{given!s:.40}'"
    if getattr(config, "attention_bias", False) and family not in BIASED:
        yield "attention has biases"
    if family == "gpt_oss" and not config.attention_bias:
        yield "attention has no biases"
    if getattr(config, "mlp_bias", False) and family == "smollm3":
        yield "feed-forward layer has biases"
    if tied and family in UNTIED:
        yield "head is tied to its embeddings"
    if not tied and family in ("gemma", *GEMMAS):
        yield "head is not tied to its embeddings"
    if family not in OWN_HEAD_DIM and head_dim * config.num_attention_heads != config.hidden_size:
        yield f"heads have {head_dim} columns, not {config.hidden_size // config.num_attention_heads}"
    if family == "smollm3" and list(config.no_rope_layers) != [n % 4 != 3 for n in range(config.num_hidden_layers)]:
        yield "layers without rotary embedding are not every fourth"


def _of_experts(config: Any) -> Iterator[str]:
    """Yield what llama.cpp takes for granted of a mixture."""
    wanted = FAMILIES[config.model_type].scales_experts
    if wanted is None:
        return
    if getattr(config, "norm_topk_prob", wanted) != wanted:
        yield f"chosen experts have weights that do{' not' * wanted} sum to 1 (norm_topk_prob)"
    if getattr(config, "decoder_sparse_step", 1) != 1 or getattr(config, "mlp_only_layers", None):
        yield "layers are not all mixtures"
    if config.model_type == "olmoe" and config.num_key_value_heads != config.num_attention_heads:
        yield "keys have fewer heads than queries"
    if getattr(config, "clip_qkv", None) is not None:
        yield "attention clips queries, keys and values (clip_qkv)"


def _of_attention(config: Any, head_dim: int) -> Iterator[str]:
    """Yield what llama.cpp takes for granted of the attention of Gemma and gpt-oss."""
    family = config.model_type
    if family == "gpt_oss" and [n % 2 == 1 for n in range(config.num_hidden_layers)] != _full(config):
        yield "layers of full attention are not every second"
    if family not in GEMMAS:
        return
    scalar, layers = config.query_pre_attn_scalar, config.num_hidden_layers
    wanted = config.hidden_size // config.num_attention_heads if layers == LARGEST[family] else head_dim
    if scalar != wanted:
        yield f"attention is scaled by {scalar} (query_pre_attn_scalar), not {wanted}"
    every = 2 if family == "gemma2" else 6
    if _full(config) != [n % every == every - 1 for n in range(layers)]:
        yield f"layers of full attention are not every {'second' if every == 2 else 'sixth'}"
    if getattr(config, "use_bidirectional_attention", False):
        yield "attention is bidirectional"
    softcaps = (config.attn_logit_softcapping, config.final_logit_softcapping)
    if (family == "gemma2" and None in softcaps) or (family != "gemma2" and softcaps[0] is not None):
        yield f"logits are capped at {softcaps[0]} and {softcaps[1]}"


def _full(config: Any) -> list[bool]:
    return [kind == "full_attention" for kind in config.layer_types]
