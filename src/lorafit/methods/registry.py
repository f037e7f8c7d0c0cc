"""The registry of methods."""

from __future__ import annotations

from lorafit.config import RunConfig
from lorafit.methods.lora.lora import Lora
from lorafit.methods.method import Method

METHODS: dict[str, Method] = {"lora": Lora()}
"""Every method by the name that the setting `method` has."""


def method_of(config: RunConfig) -> Method:
    """Return the method that `config` chooses."""
    return METHODS[config.method]
