"""registry: every training method by its name."""

from __future__ import annotations

from lorafit.config import RunConfig
from lorafit.methods.full.full import Full
from lorafit.methods.lora.lora import Lora
from lorafit.methods.method import Method

METHODS: dict[str, Method] = {"lora": Lora(), "full": Full()}
"""Every method by its value of the setting `method`."""


def method_of(config: RunConfig) -> Method:
    """Return the method that `config` chooses."""
    return METHODS[config.method]
