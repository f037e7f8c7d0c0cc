"""Decisions that full fine-tuning changes: the method itself, its learning rate and its optimizer."""

from __future__ import annotations

from lorafit.config import RunConfig
from lorafit.config.foreign_text import size_in_words
from lorafit.config.run_config import METHOD_DEFAULTS
from lorafit.memory.execution_plan import estimate_memory
from lorafit.memory.inputs import PlanInputs
from lorafit.planning.forecast import FULL_OPTIMIZERS, full_inputs


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
