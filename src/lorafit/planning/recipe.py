"""plan_recipe: the YAML recipe that reproduces a plan."""

from __future__ import annotations

from typing import Any

import yaml

from lorafit.config import RunConfig
from lorafit.planning.forecast import LEARNING_RATE
from lorafit.planning.plan import Plan

WIDTH = 1 << 20
"""Columns before YAML would fold a line: a setting is one line."""

DOCUMENT_END = "...\n"
"""What PyYAML writes after a bare scalar."""


def plan_recipe(plan: Plan, config: RunConfig) -> str:
    """A recipe for `lorafit train`: every setting that differs from its default, and every planned one with its
    reason. Of a plan that lorafit cannot run, a recipe that says what the run would be."""
    if not plan.runnable:
        return _full_recipe(plan, config)
    decided = {decision.key: decision for decision in plan.decisions}
    lines = [f"# {plan.method} of {plan.shape.name or 'a base'} on {plan.hardware.name}"]
    for key, field in RunConfig.model_fields.items():
        if key in decided:
            lines.append(f"{_line(key, decided[key].value)}  # {decided[key].source}: {decided[key].reason}")
        elif (value := getattr(config, key)) != field.get_default(call_default_factory=True):
            lines.append(_line(key, value))
    return "\n".join(lines) + "\n"


def _full_recipe(plan: Plan, config: RunConfig) -> str:
    settings = {
        "base": config.base,
        "data": list(config.data),
        "method": "full",
        "gpus": plan.gpus,
        "sharding": "weights, gradients and optimizer over all GPUs (FSDP or ZeRO-3)",
        "compute": "bf16",
        "optimizer": "adamw",
        "memory_policy": "recompute",
        "lr": LEARNING_RATE,
        "schedule": config.schedule,
        "warmup": config.warmup,
        "epochs": config.epochs,
        "examples_per_step": config.examples_per_step,
        "max_length": config.max_length,
        "seed": config.seed,
    }
    head = f"# full fine-tuning of {plan.shape.name or 'a base'}: lorafit cannot run this recipe yet"
    return "\n".join([head, *(_line(key, value) for key, value in settings.items())]) + "\n"


def _line(key: str, value: Any) -> str:
    plain = list(value) if isinstance(value, tuple) else value
    text = yaml.safe_dump(plain, default_flow_style=True, width=WIDTH, allow_unicode=True)
    return f"{key}: {text.removesuffix(DOCUMENT_END).strip()}"
