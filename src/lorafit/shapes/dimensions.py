"""Dimensions: the sizes of a model, read from its config.json.

Families use different keys for one size; `KEYS` lists them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorafit.config import base_folder, read_json
from lorafit.errors import BackboneError
from lorafit.shapes.families import Family, LayerKind

KEYS: Mapping[str, tuple[str, ...]] = {
    "layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "hidden": ("hidden_size", "n_embd", "d_model"),
    "heads": ("num_attention_heads", "n_head", "n_heads", "num_heads"),
    "kv_heads": ("num_key_value_heads", "num_kv_heads", "n_head_kv"),
    "vocab": ("vocab_size",),
    "ffn": ("intermediate_size", "ffn_hidden_size", "ffn_dim", "n_inner"),
    "positions": ("max_position_embeddings", "n_positions", "max_seq_len"),
    "experts": ("num_local_experts", "num_experts", "n_routed_experts"),
    "experts_per_token": ("num_experts_per_tok", "moe_topk"),
    "sparse_step": ("decoder_sparse_step", "interleave_moe_layer_step"),
}
LARGEST = 1 << 40
MOST_LAYERS = 512
"""Largest accepted count of layers. It is far beyond any decoder, so a larger count is a mistake."""


@dataclass(frozen=True, slots=True)
class Dimensions:
    """Hold the sizes of one model.

    Attributes:
        letters: Value of each size letter of `families`.
        layers: Decoder layers.
        sparse_layers: Decoder layers that route to experts.
        heads: Query heads.
        kv_heads: Key and value heads.
        experts_per_token: Experts that one token visits.
    """

    letters: Mapping[str, int]
    layers: int
    sparse_layers: int
    heads: int
    kv_heads: int
    experts_per_token: int

    def __getitem__(self, letter: str) -> int:
        return self.letters[letter]

    def get(self, letter: str) -> int | None:
        """Return the value of a letter, or None when config.json leaves it out."""
        return self.letters.get(letter) or None

    def layers_of(self, kind: LayerKind) -> int:
        """Return the number of layers of this kind."""
        sparse = self.sparse_layers
        return {"all": self.layers, "sparse": sparse, "dense": self.layers - sparse}[kind]


def size(text: str, sizes: Dimensions) -> int:
    """Return the value of a size such as `q+2*kv`; an empty text is 0."""
    if not text:
        return 0
    return sum(math.prod(_factor(factor, sizes) for factor in term.split("*")) for term in text.split("+"))


def holds(condition: str, config: Mapping[str, Any]) -> bool:
    """Return whether a config.json meets a condition such as `multi_query&!bias`; an empty one is false."""

    def literal(key: str) -> bool:
        if key.startswith("!"):
            return not literal(key[1:])
        return key == "true" or bool(key and config.get(key))

    return any(all(literal(key) for key in clause.split("&")) for clause in condition.split("|"))


def read_dimensions(config: Mapping[str, Any], family: Family, name: str) -> Dimensions:
    """Return the sizes in `config`.

    Raises BackboneError for a missing key and for a value that is no count.
    """
    layers, hidden, heads, vocab = (_required(config, key, name) for key in ("layers", "hidden", "heads", "vocab"))
    if layers > MOST_LAYERS:
        fix = f"check config.json: no decoder has more than {MOST_LAYERS:,}"
        raise BackboneError(f"config.json has {layers:,} layers", where=name, fix=fix)
    head_dim = _count(config, ("head_dim",), name) or hidden // heads
    if not head_dim:
        message = f"config.json has {heads:,} heads for a hidden size of {hidden:,}"
        raise BackboneError(message, where=name, fix="check config.json")
    kv_heads = 1 if holds(family.one_kv_head, config) else _optional(config, "kv_heads", name) or heads
    ffn = _optional(config, "ffn", name) or (_count(config, ("expansion_ratio",), name) or 4) * hidden
    experts = _optional(config, "experts", name) or 0
    letters = {
        "h": hidden, "d": head_dim, "q": heads * head_dim, "kv": kv_heads * head_dim, "f": ffn, "v": vocab,
        "w": _count(config, ("word_embed_proj_dim",), name) or hidden,
        "p": _optional(config, "positions", name) or 0,
        "n": experts, "a": heads,
        "x": _count(config, ("moe_intermediate_size",), name) or ffn,
        "s": _count(config, ("shared_expert_intermediate_size",), name) or ffn,
        "m": _count(config, ("intermediate_size_mlp",), name) or ffn,
    }  # fmt: skip
    sparse = _sparse_layers(config, layers, experts, name)
    return Dimensions(letters, layers, sparse, heads, kv_heads, _optional(config, "experts_per_token", name) or 1)


def _sparse_layers(config: Mapping[str, Any], layers: int, experts: int, name: str) -> int:
    """Return the number of layers that route to experts.

    They are every `sparse_step`-th layer, except those listed as dense.
    """
    if not experts:
        return 0
    listed = config.get("moe_layers")
    if isinstance(listed, list):
        return sum(0 <= layer < layers for layer in listed if isinstance(layer, int))
    step = _optional(config, "sparse_step", name) or 1
    dense = config.get("mlp_only_layers")
    chosen = range(step - 1, layers, step)
    return len(chosen) - (sum(layer in chosen for layer in dense) if isinstance(dense, list) else 0)


def _factor(factor: str, sizes: Dimensions) -> int:
    return int(factor) if factor.isdigit() else sizes[factor]


def _required(config: Mapping[str, Any], key: str, name: str) -> int:
    value = _optional(config, key, name)
    if not value:
        raise BackboneError(f"config.json lacks '{KEYS[key][0]}'", where=name, fix="choose a causal LM of transformers")
    return value


def _optional(config: Mapping[str, Any], key: str, name: str) -> int | None:
    return _count(config, KEYS[key], name)


def _count(config: Mapping[str, Any], keys: tuple[str, ...], name: str) -> int | None:
    key = next((key for key in keys if config.get(key) is not None), None)
    if key is None:
        return None
    value = config[key]
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < LARGEST:
        raise BackboneError(
            f"config.json has {key} = {value!r:.40}", where=name, fix=f"set {key} to a whole number below {LARGEST:,}"
        )
    return value


NOISE = re.compile(r"dropout|pdrop|drop_rate|layerdrop|jitter")
"""Keys of config.json for noise in training: dropout of the base's own layers, and jitter of its routers."""
NO_NOISE = {"phimoe": ("router_jitter_noise",)}
"""Keys of a model type that name noise and act outside training too: Phi-3.5-MoE's tells which scores are near ties."""


def noise_keys(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the keys of `config` that add noise in training. lorafit trains without it: only `dropout` acts."""
    kept = NO_NOISE.get(str(config.get("model_type")), ())
    return tuple(
        key
        for key, value in config.items()
        if NOISE.search(key)
        and isinstance(value, int | float)
        and not isinstance(value, bool)
        and value > 0
        and key not in kept
    )


NESTED = ("text_config", "llm_config", "language_config")
OTHER_TASKS = ("MaskedLM", "Classification", "QuestionAnswering", "ForPreTraining")


def read_config(folder: Path) -> dict[str, Any]:
    """Return the config.json in `folder`. Raises BackboneError when it is missing or no JSON object."""
    config = read_json(folder / "config.json", BackboneError, fix="download the base again")
    method = next((method for name, method in BESIDE.items() if (folder / name).is_file()), "")
    return {"quantization_config": {"quant_method": method}, **config} if method else config


BESIDE = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
"""Files in which older releases of AutoGPTQ and AutoAWQ say that a checkpoint is quantized, beside its config.json."""


def require_causal(config: Mapping[str, Any], name: str) -> None:
    """Raise BackboneError when `config` names another kind of model than a causal one."""
    fix = "choose a causal language model"
    if config.get("is_encoder_decoder"):
        raise BackboneError(
            "the base is an encoder-decoder, and lorafit trains decoder-only models", where=name, fix=fix
        )
    listed = config.get("architectures")
    architectures = [str(architecture) for architecture in listed] if isinstance(listed, list) else []
    if architectures and all(architecture.endswith(OTHER_TASKS) for architecture in architectures):
        raise BackboneError(f"{architectures[0]} is not a causal language model", where=name, fix=fix)


def require_groups(text: Mapping[str, Any], name: str) -> None:
    """Raise BackboneError when the query heads cannot be shared out among the heads of keys and values."""
    heads, groups = text.get("num_attention_heads"), text.get("num_key_value_heads")
    if not isinstance(heads, int) or not isinstance(groups, int) or groups <= 0:
        return
    # latent attention makes keys for every head, and transformers would still repeat them for groups
    latent = text.get("kv_lora_rank") and heads != groups
    if heads % groups or latent:
        raise BackboneError(
            f"config.json says num_attention_heads = {heads} and num_key_value_heads = {groups}, and the first must be "
            + ("the second where attention is latent" if latent else "a multiple of the second"),
            where=name,
            fix=f"set num_key_value_heads to {heads}" if latent else "choose another base",
        )


def text_part(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of the text decoder, without empty values.

    They are a nested text_config, or else all of `config`.
    """
    nested = next((config[key] for key in NESTED if isinstance(config.get(key), Mapping)), config)
    outer = {key: config.get(key) for key in ("model_type", "tie_word_embeddings")}
    return {key: value for key, value in {**outer, **nested}.items() if value is not None}


PUBLISHED = {"fp8": "FP8", "mxfp8": "MXFP8", "mxfp4": "MXFP4"}
"""Formats of published checkpoints that are dequantized while they are loaded, with their names in prose."""


def published_in(config: Mapping[str, Any]) -> str | None:
    """Return the format of PUBLISHED in which a checkpoint is stored; None for any other."""
    settings = config.get("quantization_config")
    method = settings.get("quant_method") if isinstance(settings, Mapping) else None
    return method if isinstance(method, str) and method in PUBLISHED else None


def published_format(base: str, revision: str | None = None) -> str | None:
    """Return the name of the format of PUBLISHED in which `base` is stored; None for any other."""
    published = published_in(read_config(base_folder(base, revision)))
    return PUBLISHED[published] if published else None


def quantization_of(config: Mapping[str, Any]) -> str | None:
    """Return how a checkpoint is quantized when it is loaded; None for a plain one, and for the formats of PUBLISHED.

    bitsandbytes gives `nf4`, `fp4` or `int8`, other methods their own name.
    """
    settings = config.get("quantization_config")
    if not settings or published_in(config):
        return None
    if not isinstance(settings, Mapping):
        return str(settings)
    method = str(settings.get("quant_method") or ("bitsandbytes" if "load_in_4bit" in settings else "unknown"))
    if method != "bitsandbytes":
        return method
    if not settings.get("load_in_4bit") and not settings.get("_load_in_4bit"):
        return "int8"
    return str(settings.get("bnb_4bit_quant_type") or "fp4")
