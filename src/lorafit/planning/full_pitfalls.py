"""Pitfalls of full fine-tuning: findings P8 and P9, and obstacles that only a full run has."""

from __future__ import annotations

from collections.abc import Iterator

from lorafit.config import RunConfig
from lorafit.config.foreign_text import at_least, at_most
from lorafit.config.run_config import METHOD_DEFAULTS
from lorafit.findings import Finding, Severity
from lorafit.memory.inputs import PlanInputs

HIGHEST_LR = 1e-4
"""Learning rate above which weights of a pretrained model drift: five times the default."""
FEWEST_ROWS = 1_000
"""Rows below which an adapter learns as much, and forgets less."""
ADAPTER_SETTINGS = (
    "rank", "alpha", "rslora", "dora", "init_lora_weights", "trainable_tokens", "modules_to_save", "loraplus_lr_ratio",
    "dropout", "targets",
)  # fmt: skip


def full_pitfalls(inputs: PlanInputs) -> Iterator[Finding]:
    """Yield a finding for each pitfall of a full run's settings."""
    yield from _learning_rate(inputs.config)
    yield from _idle(inputs.config)
    yield from _rows(inputs)


def offloading(inputs: PlanInputs) -> Iterator[Finding]:
    """Yield a finding for activations that a memory policy sends to the host beside sharded weights."""
    policy = inputs.policy
    if inputs.shards > 1 and policy is not None and policy.offloaded_layers:
        yield Finding(
            "P0",
            Severity.ERROR,
            "memory_policy offloads activations, and the weights are sharded over several GPUs",
            where="memory_policy",
            why="an offloaded layer finds its weights by their place in memory, which changes when it is gathered",
            fix="set memory_policy: recompute, or leave it out",
        )


def host_moments(inputs: PlanInputs) -> Iterator[Finding]:
    """Yield a finding for moments that host memory has no room for."""
    needed, has = inputs.host_moment_bytes, inputs.hardware.host_bytes
    if needed > has:
        yield Finding(
            "P0",
            Severity.ERROR,
            f"the moments take {at_least(needed)} of host memory, and {at_most(has)} may be pinned",
            where="optimizer",
            why="the GPU has no room for them, and half of the free host memory is the most that a run pins",
            fix="free host memory, set method: lora and quantization: nf4, or use several GPUs",
        )


def _learning_rate(config: RunConfig) -> Iterator[Finding]:
    if config.lr > HIGHEST_LR:
        yield Finding(
            "P8",
            Severity.WARNING,
            f"the learning rate is {config.lr:g}, and every weight trains",
            where="lr",
            why="this is a learning rate for adapters; pretrained weights drift at it, and the base's skills go first",
            fix=f"set lr: {METHOD_DEFAULTS['full']['lr']:g}, or leave it out",
        )


def _idle(config: RunConfig) -> Iterator[Finding]:
    usual = {key: RunConfig.model_fields[key].get_default() for key in ADAPTER_SETTINGS}
    idle = [key for key, value in usual.items() if getattr(config, key) != value]
    if idle:
        yield Finding(
            "P8",
            Severity.WARNING,
            f"method is full, which does not use {', '.join(idle)}",
            where=idle[0],
            why="these are settings of adapters, and a full run has none",
            fix="leave them out, or set method: lora",
        )


def _rows(inputs: PlanInputs) -> Iterator[Finding]:
    rows = inputs.stats.rows
    if rows < FEWEST_ROWS:
        yield Finding(
            "P9",
            Severity.WARNING,
            f"every weight trains on {rows:,} rows",
            where="method",
            why="few rows are learnt by heart, and what the base knew beside them is forgotten",
            fix="set method: lora, or add rows",
        )
