"""What a base's config.json says about the checkpoint: is it a decoder, where is its text part, is it quantised."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorafit.config import read_json
from lorafit.errors import BackboneError

NESTED = ("text_config", "llm_config", "language_config")
TOWERS = ("vision_config", "audio_config")
OTHER_TASKS = ("MaskedLM", "Classification", "QuestionAnswering", "ForPreTraining")


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json in `folder`. Raises BackboneError when it is none."""
    return read_json(folder / "config.json", BackboneError, fix="download the base again")


def require_causal(config: Mapping[str, Any], name: str) -> None:
    """BackboneError for what plainly is no causal language model."""
    fix = "choose a causal language model"
    if config.get("is_encoder_decoder"):
        raise BackboneError("an encoder-decoder, and lorafit trains decoder-only models", where=name, fix=fix)
    listed = config.get("architectures")
    architectures = [str(architecture) for architecture in listed] if isinstance(listed, list) else []
    if architectures and all(architecture.endswith(OTHER_TASKS) for architecture in architectures):
        raise BackboneError(f"{architectures[0]} is no causal language model", where=name, fix=fix)


def text_part(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the text decoder, without empty ones: a nested text_config, or the whole."""
    nested = next((config[key] for key in NESTED if isinstance(config.get(key), Mapping)), config)
    outer = {key: config.get(key) for key in ("model_type", "tie_word_embeddings")}
    return {key: value for key, value in {**outer, **nested}.items() if value is not None}


def tower_parameters(config: Mapping[str, Any]) -> int:
    """An estimate of an image or audio tower: the matrices of its layers; 0 where there is none."""
    return sum(_tower(config[key]) for key in TOWERS if isinstance(config.get(key), Mapping))


def quantization_of(config: Mapping[str, Any]) -> str | None:
    """`nf4` or `fp4` of bitsandbytes, else the method's own name; None for a plain checkpoint."""
    settings = config.get("quantization_config")
    if not isinstance(settings, Mapping) or not settings:
        return None
    method = str(settings.get("quant_method") or ("bitsandbytes" if "load_in_4bit" in settings else "unknown"))
    if method != "bitsandbytes":
        return method
    if not settings.get("load_in_4bit") and not settings.get("_load_in_4bit"):
        return "int8"
    return str(settings.get("bnb_4bit_quant_type") or "fp4")


def _tower(config: Mapping[str, Any]) -> int:
    hidden, layers = _count(config, "hidden_size"), _count(config, "num_hidden_layers")
    inner = _count(config, "intermediate_size") or 4 * hidden
    return layers * hidden * (4 * hidden + 2 * inner)


def _count(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    return value if isinstance(value, int) and 0 <= value < 1 << 30 else 0
