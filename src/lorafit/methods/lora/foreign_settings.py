"""foreign_settings: values of an adapter_config.json that somebody else may have written."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from lorafit.config import MAX_RANK, MAX_SCALE
from lorafit.errors import AdapterError
from lorafit.methods.lora.adapted_model import LoraConfig

HARMLESS_INITS = (True, False, None, "gaussian", "orthogonal", "eva")
"""Initialisations that leave the base as it is. The others move a part of its weights into the adapter."""
FREE_KEYS = frozenset(
    ("r", "lora_alpha", "lora_dropout", "target_modules", "task_type", "base_model_name_or_path", "revision",
     "inference_mode", "peft_version", "use_rslora", "use_dora", "init_lora_weights", "fan_in_fan_out",
     "target_parameters", "rank_pattern", "alpha_pattern", "trainable_token_indices",
     "modules_to_save", "eva_config")
)  # fmt: skip
"""Keys that an adapter may set; the last says how PEFT began it. Others would change it, so they must have defaults."""
TASKS = (None, "CAUSAL_LM")
CONVERT = "convert it with PEFT's save_pretrained(…, path_initial_model_for_weight_conversion=…)"


def check_keys(raw: Mapping[str, Any], where: str) -> None:
    """Raise AdapterError for keys of `raw` that plain LoRA lacks, and for targets and ranks that are none."""
    defaults = LoraConfig().to_dict()
    if raw.get("peft_type") != "LORA":
        raise AdapterError(f"peft_type is {_short(raw.get('peft_type'))}, which is no LoRA adapter", where=where)
    for key, value in raw.items():
        if key in FREE_KEYS or key == "peft_type" or _is_unset(value) or value == jsonable(defaults.get(key)):
            continue
        raise AdapterError(f"the adapter sets {key}, which plain LoRA does not have", where=where)
    targets = raw.get("target_modules")
    if isinstance(targets, str):
        raise AdapterError("target_modules is a regular expression, not a list of names", where=where)
    has_any = targets or raw.get("target_parameters")
    if not isinstance(targets, list) or not has_any or not all(is_name(target) for target in targets):
        raise AdapterError("target_modules is no list of module names", where=where)
    if not isinstance(raw.get("r"), int) or isinstance(raw["r"], bool) or not 1 <= raw["r"] <= MAX_RANK:
        raise AdapterError(f"rank {raw.get('r')} is not between 1 and {MAX_RANK}", where=where)


def scale_of(raw: Mapping[str, Any], where: str) -> float:
    """Return alpha / r of `raw`, or alpha / √r. Raises AdapterError for what is no such number."""
    alpha = raw.get("lora_alpha")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha <= sys.float_info.max:
        raise AdapterError(f"alpha {alpha!r:.40} is no positive number", where=where)
    scale = alpha / (math.sqrt(raw["r"]) if raw.get("use_rslora") else raw["r"])
    if scale > MAX_SCALE:
        raise AdapterError(f"the scale alpha / r = {scale:g} is over {MAX_SCALE:g}", where=where)
    return scale


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
    tables = raw.get("modules_to_save")
    if tables and not (isinstance(tables, list) and all(map(is_name, tables))):
        raise AdapterError("modules_to_save is no list of module names", where=where)
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


def _is_unset(value: Any) -> bool:
    return not value and type(value) not in (int, float)  # layers_to_transform: 0 is the first layer


def is_name(target: Any) -> bool:
    """Return True for a dotted name of a module."""
    return isinstance(target, str) and all(part.isidentifier() or part.isdigit() for part in target.split("."))


def jsonable(value: Any) -> Any:
    """Return `value` as JSON holds it."""
    return json.loads(json.dumps(value, default=lambda other: list(other) if isinstance(other, set) else str(other)))
