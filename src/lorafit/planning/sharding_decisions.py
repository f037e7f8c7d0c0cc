"""sharding_decisions: whether several GPUs share the layers of a frozen base."""

from __future__ import annotations

from collections.abc import Iterator

from lorafit.config.foreign_text import size_in_words
from lorafit.findings import Finding, Severity
from lorafit.memory.execution_plan import estimate_memory
from lorafit.memory.inputs import PlanInputs


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
