"""Full fine-tuning in a plan: its decisions, its pitfalls P8 and P9, and obstacles that only it has."""

from __future__ import annotations

from collections.abc import Iterator

from lorafit.config import RunConfig
from lorafit.config.foreign_text import at_least, at_most, size_in_words
from lorafit.config.run_config import METHOD_DEFAULTS
from lorafit.findings import Finding, Severity
from lorafit.memory.execution_plan import estimate_memory
from lorafit.memory.inputs import PlanInputs
from lorafit.planning.forecast import FULL_OPTIMIZERS, full_inputs

HIGHEST_LR = 1e-4
"""Learning rate above which weights of a pretrained model drift: five times the default."""
FEWEST_ROWS = 1_000
"""Rows below which an adapter learns as much, and forgets less."""
ADAPTER_SETTINGS = (
    "rank", "alpha", "rslora", "dora", "init_lora_weights", "trainable_tokens", "modules_to_save", "loraplus_lr_ratio",
    "dropout", "targets",
)  # fmt: skip


def method_choice(inputs: PlanInputs, reason: str) -> tuple[str, str]:
    """Return the method of `inputs` and why; `reason` is the matrix's for training every weight."""
    if not inputs.is_full:
        return "lora", "an adapter on a frozen base takes little memory"
    return "full", f"{inputs.stats.rows:,} rows and the goal accuracy: {reason}"


def learning_rate(inputs: PlanInputs) -> tuple[float, str]:
    """Return the peak learning rate of the method, and why."""
    if inputs.is_full:
        return METHOD_DEFAULTS["full"]["lr"], "a tenth of an adapter's: every weight moves"
    return RunConfig.model_fields["lr"].get_default(), "the usual peak for adapters"


def full_optimizer(inputs: PlanInputs) -> tuple[str, str]:
    """Return the most accurate optimizer that fits, and the bytes that decided."""
    value = full_inputs(inputs).optimizer
    first = inputs.with_settings(optimizer=FULL_OPTIMIZERS[0])
    peak = size_in_words(estimate_memory(first).peak_bytes)
    has = f"{peak} of {size_in_words(inputs.hardware.memory_bytes)}"
    if value == FULL_OPTIMIZERS[2]:
        moments = size_in_words(full_inputs(inputs).host_moment_bytes)
        return value, (
            f"moments on the GPU do not fit {size_in_words(inputs.hardware.memory_bytes)}: 8-bit ones take {moments} "
            "of host memory; each weight is updated within the backward pass, its gradient clipped by itself"
        )
    if value != FULL_OPTIMIZERS[0]:
        return value, f"16-bit weights with stochastic rounding and 8-bit moments: fp32 master weights need {has}"
    if not first.has_master_weights:
        return value, f"weights and moments in fp32 take {has}"
    return value, f"fp32 master weights and 32-bit moments take {has}"


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
