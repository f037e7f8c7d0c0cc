"""Several GPUs in a plan: their communication in a step, and the sharing of a frozen base."""

from __future__ import annotations

from collections.abc import Iterator

from lorafit.config.foreign_text import size_in_words
from lorafit.findings import Finding, Severity
from lorafit.hardware.device import link_between
from lorafit.memory.execution_plan import ExecutionPlan, estimate_memory
from lorafit.memory.footprint import base_layer_bytes
from lorafit.memory.inputs import ADAPTER_BYTES, PlanInputs
from lorafit.memory.sharded import moved_bytes


def all_reduce_s(inputs: PlanInputs) -> float:
    """Return the seconds of summing the adapter's gradients over all GPUs; 0 on one.

    In a ring of N each GPU sends 2 (N - 1) / N of the bytes (Patarasuk and Yuan 2009).
    """
    if inputs.gpus == 1:
        return 0.0
    _, rate = link_between(inputs.hardware)
    return 2 * (inputs.gpus - 1) / inputs.gpus * _gradient_bytes(inputs) / (rate * 1e9)


def communication_s(inputs: PlanInputs, plan: ExecutionPlan) -> float:
    """Return the seconds by which communication prolongs the step of `plan`; 0 on one GPU.

    Adapter gradients are summed after the step. Sharded layers are gathered and their gradients scattered beside the
    arithmetic, which hides what is shorter; embeddings and head are waited for.
    """
    if inputs.base_shards > 1:
        _, rate = link_between(inputs.hardware)
        within_s = gathered_base_bytes(inputs) * plan.micro_batches / (rate * 1e9)
        return all_reduce_s(inputs) + max(0.0, within_s - plan.step_s)
    if inputs.shards == 1:
        return all_reduce_s(inputs)
    _, rate = link_between(inputs.hardware)
    within, outside = (one * plan.micro_batches / (rate * 1e9) for one in moved_bytes(inputs))
    return outside + max(0.0, within - plan.step_s)


def gathered_base_bytes(inputs: PlanInputs) -> float:
    """Return the bytes of a shared base that each GPU receives for one micro-batch: every layer, forward and back."""
    return 2 * (inputs.base_shards - 1) / inputs.base_shards * base_layer_bytes(inputs)


def several_in_words(inputs: PlanInputs, plan: ExecutionPlan) -> str:
    """Return the assumptions about several GPUs, in one line; empty for one."""
    if inputs.gpus == 1:
        return ""
    name, rate = link_between(inputs.hardware)
    step_s = communication_s(inputs, plan)
    speed = inputs.gpus * plan.step_tokens / (plan.step_s + step_s)
    if inputs.shards > 1:
        moved = sum(moved_bytes(inputs)) / 1e9
        return (
            f"{inputs.gpus} GPUs, which hold weights, gradients and moments in shards: {speed:,.0f} tokens/s together; "
            f"{moved:,.1f} GB gathered and scattered in a micro-batch over {name} at {rate:.0f} GB/s (assumed), of "
            f"which a step waits {1000 * step_s:.2g} ms"
        )
    if inputs.base_shards > 1:
        return (
            f"{inputs.gpus} GPUs, which share the base's layers: {speed:,.0f} tokens/s together; "
            f"{gathered_base_bytes(inputs) / 1e9:,.1f} GB gathered in a micro-batch over {name} at {rate:.0f} GB/s "
            f"(assumed), of which a step waits {1000 * step_s:.2g} ms"
        )
    return (
        f"{inputs.gpus} GPUs, each with a copy of the base and its share of a step: {speed:,.0f} tokens/s together; "
        f"{_gradient_bytes(inputs) / 1e6:,.1f} MB of gradients summed over {name} at {rate:.0f} GB/s (assumed), "
        f"{1000 * step_s:.2g} ms a step"
    )


def _gradient_bytes(inputs: PlanInputs) -> int:
    return inputs.adapter_parameters * ADAPTER_BYTES


def base_sharding(inputs: PlanInputs) -> tuple[str, str]:
    """Return the value of shard_base, and the bytes that decided."""
    if inputs.gpus == 1:
        return "off", "one device holds the whole base"
    whole = estimate_memory(inputs.with_settings(shard_base="off"))
    has = f"{size_in_words(whole.peak_bytes)} of {size_in_words(inputs.hardware.memory_bytes)}"
    if whole.fits(inputs.hardware):
        return "off", f"a whole base on each GPU takes {has}, and moves gradients only"
    return "on", f"a whole base on each GPU would take {has}; each holds 1/{inputs.gpus} of every layer instead"


def unshardable(inputs: PlanInputs) -> Iterator[Finding]:
    """Yield a finding for settings that need the weights of a shared base whole."""
    if inputs.base_shards == 1:
        return
    packed = inputs.in_4_bits and any(part.stacked for part in inputs.shape.packed)
    init = inputs.config.init_lora_weights
    at_random = "set init_lora_weights: default"
    for applies, what, where, why, fix in (
        (inputs.is_dora, "dora is set", "dora", "DoRA starts from the lengths of whole weights", "set dora: false"),
        (init != "default", f"init_lora_weights is {init}", "init_lora_weights", "it reads whole weights", at_random),
        (packed, "its experts are in 4 bits", "shard_base", "packed experts are not shared yet", "set shard_base: off"),
    ):
        if applies:
            yield Finding(
                "P0",
                Severity.ERROR,
                f"the base's layers are shared by {inputs.gpus} GPUs, and {what}",
                where=where,
                why=why,
                fix=fix,
            )
