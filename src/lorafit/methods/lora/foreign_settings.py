"""foreign_settings: values of an adapter_config.json that somebody else may have written."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lorafit.errors import AdapterError
from lorafit.methods.lora.adapted_model import LoraConfig

HARMLESS_INITS = (True, False, None, "gaussian", "orthogonal", "eva")
"""Initialisations that leave the base as it is. The others move a part of its weights into the adapter."""
TASKS = (None, "CAUSAL_LM")
CONVERT = "convert it with PEFT's save_pretrained(…, path_initial_model_for_weight_conversion=…)"


def check_values(raw: Mapping[str, Any], where: str) -> None:
    """Raise AdapterError for a value of `raw` that would fail in PEFT, or that would mean another model."""
    init = raw.get("init_lora_weights", True)
    if not any(init is known or (isinstance(init, str) and init == known) for known in HARMLESS_INITS):
        what = f"init_lora_weights is {_short(init)}, which changes the base's weights, and this base has its own"
        raise AdapterError(what, where=where, fix=CONVERT)
    dropout = raw.get("lora_dropout", 0.0)
    if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise AdapterError(f"lora_dropout is {_short(dropout)}, not a number from 0 to 1", where=where)
    for key in ("use_rslora", "use_dora", "inference_mode", "fan_in_fan_out"):
        if not isinstance(raw.get(key, False), bool | None):
            raise AdapterError(f"{key} is {_short(raw[key])}, not true or false", where=where)
    tokens = raw.get("trainable_token_indices")
    if tokens is not None and not _are_tokens(tokens):
        what = "trainable_token_indices is no mapping of a module's name to different token ids"
        raise AdapterError(what, where=where)
    if raw.get("task_type") not in TASKS:
        raise AdapterError(f"task_type is {_short(raw['task_type'])}, not CAUSAL_LM", where=where)


def plain_settings(raw: Mapping[str, Any], rank: int, targets: Sequence[str]) -> LoraConfig:
    """Return PEFT's settings of a checked adapter. Keys that are not named here have PEFT's defaults."""
    return LoraConfig(
        r=rank,
        lora_alpha=raw["lora_alpha"],
        lora_dropout=raw.get("lora_dropout", 0.0),
        use_rslora=bool(raw.get("use_rslora")),
        use_dora=bool(raw.get("use_dora")),
        fan_in_fan_out=bool(raw.get("fan_in_fan_out")),
        target_modules=list(targets),
        task_type="CAUSAL_LM",
        base_model_name_or_path=raw.get("base_model_name_or_path"),
        revision=raw.get("revision"),
        inference_mode=True,
    )


def _are_tokens(tokens: Any) -> bool:
    return isinstance(tokens, dict) and all(
        isinstance(name, str)
        and isinstance(ids, list)
        and ids
        and all(type(one) is int and one >= 0 for one in ids)
        and len(set(ids)) == len(ids)
        for name, ids in tokens.items()
    )


def _short(value: Any) -> str:
    return f"{value!r:.40}" if not isinstance(value, float) or math.isfinite(value) else str(value)
