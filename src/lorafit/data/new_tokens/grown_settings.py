"""grown_settings: let a run take the base with its new tokens, whose rows train."""

from __future__ import annotations

from dataclasses import replace

from lorafit.config import Resolved, RunConfig
from lorafit.data.new_tokens.grown_base import GrownBase


def with_new_tokens(resolved: Resolved) -> Resolved:
    """Return `resolved` with the grown base of its `new_tokens`, and with their rows among the trained ones."""
    config = resolved.config
    if not config.new_tokens or not config.base:
        return resolved
    return replace(resolved, config=grown(config))


def grown(config: RunConfig) -> RunConfig:
    """Return `config` over the grown base of its `new_tokens`. Raises UsageError, BackboneError."""
    base = GrownBase.of(config.base, config.revision, config.new_tokens)
    every_row = config.method == "full" or config.modules_to_save
    rows = () if every_row else tuple(dict.fromkeys((*config.trainable_tokens, *config.new_tokens)))
    taken = {"base": str(base.folder), "revision": None}
    return config.model_copy(update={**taken, **({"trainable_tokens": rows} if rows else {})})
