"""Pitfalls: findings P0 to P9, on settings that cannot finish and common mistakes."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from typing import Any

from lorafit.config import RunConfig, parse_bytes
from lorafit.config.foreign_text import at_least, at_most
from lorafit.config.memory_policy import MemoryPolicy
from lorafit.findings import Finding, Severity
from lorafit.hardware.device import GIB, GPUS, Hardware, from_gpu
from lorafit.memory.execution_plan import MemoryEstimate, estimate_memory
from lorafit.memory.inputs import PlanInputs
from lorafit.planning.decisions import rank_limit
from lorafit.planning.forecast import FULL_OPTIMIZERS
from lorafit.planning.full_method import full_pitfalls, host_moments, offloading
from lorafit.planning.several_gpus import unshardable

FREEZABLE = (None, "nf4", "fp4")
TENTH = GIB // 10
"""Unit of memory in advice, a tenth of a GiB. Rounding up makes the advised memory enough."""
MAX_DROPOUT = 0.1


def obstacles(inputs: PlanInputs, memory: MemoryEstimate) -> Iterator[Finding]:
    """Yield a finding for everything that would stop the run.

    These are a base of the wrong kind, rows beyond its positions, an optimizer without CUDA, and memory.
    """
    yield from _kind(inputs)
    yield from _positions(inputs)
    yield from _optimizer(inputs)
    yield from _budget(inputs)
    yield from offloading(inputs)
    yield from host_moments(inputs)
    yield from unshardable(inputs)
    if not memory.fits(inputs.hardware):
        yield _too_large(inputs, memory)
    elif memory.peak_bytes * (1 + memory.uncertainty) > inputs.hardware.memory_bytes:
        yield _tight(inputs, memory)


def _kind(inputs: PlanInputs) -> Iterator[Finding]:
    """Yield a finding for a base that is already quantized, or that cannot be quantized."""
    shape, quantization = inputs.shape, inputs.config.quantization

    def stop(message: str, where: str, why: str, fix: str) -> Finding:
        return Finding("P0", Severity.ERROR, message, where=where, why=why, fix=fix)

    if shape.quantized not in FREEZABLE:
        why = "lorafit trains over 16-bit checkpoints, and 4-bit ones of bitsandbytes; it dequantizes FP8 and MXFP4"
        message = f"the base is already quantized with {shape.quantized:.40}"
        yield stop(message, "base", why, "choose the base's 16-bit checkpoint")
    elif shape.quantized and quantization == "none":
        yield stop(
            f"the base is already in {shape.quantized}, and quantization is none",
            "quantization",
            "4-bit weights cannot be loaded as 16-bit ones",
            f"set {'method: lora' if inputs.is_full else 'quantization: nf4'}, or choose the base's 16-bit checkpoint",
        )
    if shape.linear_class != "Linear" and quantization == "nf4":
        yield stop(
            f"{shape.family} keeps its projections in {shape.linear_class} layers, which are not supported in 4 bits",
            "quantization",
            "the 4-bit layer replaces torch's Linear alone",
            "set quantization: none, or choose a base with linear layers",
        )


def _positions(inputs: PlanInputs) -> Iterator[Finding]:
    shape, longest = inputs.shape, inputs.stats.longest
    if shape.max_positions and longest > shape.max_positions:
        learned = shape.learned_positions
        yield Finding(
            "P0",
            Severity.ERROR if learned else Severity.WARNING,
            f"the longest row has {longest:,} tokens, and the base supports {shape.max_positions:,}",
            where="data",
            why=f"the base {'has no' if learned else 'was not trained on'} positions beyond that",
            fix=f"set max_length: {shape.max_positions} and on_long: drop, or choose a base with a longer context",
        )


def _optimizer(inputs: PlanInputs) -> Iterator[Finding]:
    if not inputs.on_cuda and inputs.config.optimizer not in ("auto", "adamw"):
        yield Finding(
            "P0",
            Severity.ERROR,
            f"the optimizer is {inputs.config.optimizer}, and there is no CUDA GPU",
            where="optimizer",
            why="the 8-bit optimizers are CUDA kernels",
            fix="set optimizer: adamw, or leave it on auto",
        )


def _budget_bytes(inputs: PlanInputs) -> int | None:
    return parse_bytes(inputs.config.gpu_memory, "gpu_memory") if inputs.config.gpu_memory else None


def _budget(inputs: PlanInputs) -> Iterator[Finding]:
    """Yield a finding for a budget beyond the device's memory."""
    budget = _budget_bytes(inputs)
    if budget and budget > inputs.hardware.memory_bytes:
        available = at_most(inputs.hardware.memory_bytes)
        yield Finding(
            "P0",
            Severity.WARNING,
            f"gpu_memory is {at_least(budget)}, and {inputs.hardware.name} has {available}",
            where="gpu_memory",
            why=f"a budget cannot add memory, so the plan is for {available}",
            fix="lower gpu_memory, leave it out, or name a larger GPU with gpu",
        )


def _is_budgeted(inputs: PlanInputs) -> bool:
    """Return True when the limit is the setting `gpu_memory` and not the device."""
    budget = _budget_bytes(inputs)
    return budget is not None and budget <= inputs.hardware.memory_bytes


def _available(inputs: PlanInputs) -> str:
    """Return the available memory in words, with the name of its limit."""
    has = at_most(inputs.hardware.memory_bytes)
    return f"gpu_memory allows {has}" if _is_budgeted(inputs) else f"{inputs.hardware.name} has {has}"


def _too_large(inputs: PlanInputs, memory: MemoryEstimate) -> Finding:
    return Finding(
        "P0",
        Severity.ERROR,
        f"the run needs about {at_least(memory.peak_bytes)}, and {_available(inputs)}",
        where="memory",
        why="it would run out of memory",
        fix=what_would_fit(inputs, memory.uncertainty),
    )


def _tight(inputs: PlanInputs, memory: MemoryEstimate) -> Finding:
    return Finding(
        "P0",
        Severity.WARNING,
        f"the run needs about {at_least(memory.peak_bytes)} ± {memory.uncertainty:.0%}, and {_available(inputs)}",
        where="memory",
        why="the run may not fit, because the limit lies within the error of the estimate",
        fix=what_would_fit(inputs, memory.uncertainty),
    )


def what_would_fit(inputs: PlanInputs, margin: float) -> str:
    """Return advice on the smallest change of settings that fits, with the estimate's `margin` free.

    When no change is enough, the advice names the memory, and the smallest GPU, that fits with all changes.
    """
    remedies = list(_remedies(inputs))
    for remedy in remedies:
        if _fits(inputs.with_settings(**remedy), margin):
            return f"set {_settings(remedy)}"
    together: dict[str, Any] = {}
    for remedy in remedies:
        together |= remedy
        if together != remedy and _fits(inputs.with_settings(**together), margin):
            return f"set {_settings(together)}"
    return _more_memory(inputs.with_settings(**together), together, margin)


def _fits(inputs: PlanInputs, margin: float) -> bool:
    return estimate_memory(inputs).peak_bytes * (1 + margin) <= inputs.hardware.memory_bytes


def _remedies(inputs: PlanInputs) -> Iterator[dict[str, Any]]:
    """Yield the changes that save memory, the least painful first.

    A memory policy on auto already tries smaller micro-batches.
    """
    auto = {"memory_policy": "auto"} if inputs.config.memory_policy != "auto" else {}
    if auto:
        yield auto
    shape = inputs.shape
    if inputs.is_full:
        if inputs.has_master_weights and inputs.on_cuda:
            yield {"optimizer": FULL_OPTIMIZERS[1]}
        yield {"method": "lora", "optimizer": "auto"}
    if inputs.config.quantization == "none" and shape.quantized is None and shape.linear_class == "Linear":
        yield {"quantization": "nf4"}


def _more_memory(inputs: PlanInputs, changes: dict[str, Any], margin: float) -> str:
    def fits(tenths: int) -> bool:
        return _fits(inputs.on(inputs.hardware.with_memory(tenths * TENTH)), margin)

    # the need depends on the available memory, so the least sufficient memory is found by search
    now, step = inputs.hardware.memory_bytes // TENTH, 1
    while not fits(now + step):
        step *= 2
    candidates = range(now + step // 2 + 1, now + step)
    enough = TENTH * (candidates.start + bisect_left(candidates, True, key=fits))
    with_changes = f" with {_settings(changes)}" if changes else ""
    if _is_budgeted(inputs):
        budget = at_least(enough).replace(" ", "").replace(",", "")
        return f"choose a smaller base, shorter rows, or gpu_memory: {budget}{with_changes}"
    gpu = _smallest_gpu(enough, inputs.compute) if inputs.on_cuda else None
    hint = f", as on a GPU like '{gpu.name}'" if gpu else ""
    return f"choose a smaller base, shorter rows, or {at_least(enough)} of memory{with_changes}{hint}"


def _smallest_gpu(size_bytes: int, compute: str) -> Hardware | None:
    """Return the smallest GPU with `size_bytes` of memory that supports `compute`; None without one."""
    gpus = sorted((from_gpu(gpu) for gpu in GPUS), key=lambda gpu: gpu.memory_bytes)
    able = [gpu for gpu in gpus if {"bf16": gpu.bf16, "fp8": gpu.fp8}.get(compute, True)]
    return next((gpu for gpu in able if gpu.memory_bytes >= size_bytes), None)


def _settings(changes: dict[str, Any]) -> str:
    return " and ".join(f"{key}: {value}" for key, value in changes.items())


def pitfalls(inputs: PlanInputs, memory: MemoryEstimate) -> list[Finding]:
    """Return a finding for each pitfall of the settings, in the order of the codes."""
    if inputs.is_full:
        return [
            *_checkpointing(inputs, memory),
            *_precision(inputs.config, inputs.hardware),
            *full_pitfalls(inputs),
        ]
    return [
        *_no_attention(inputs),
        *_checkpointing(inputs, memory),
        *_precision(inputs.config, inputs.hardware),
        *_dropout(inputs.config),
        *_serving(inputs.config),
        *_rank(inputs),
    ]


def _no_attention(inputs: PlanInputs) -> Iterator[Finding]:
    attention = {linear.name for linear in inputs.shape.linears if linear.is_attention}
    if attention and not any(linear.is_attention for linear in inputs.shape.named(inputs.targets)):
        yield Finding(
            "P1",
            Severity.WARNING,
            f"the targets ({', '.join(inputs.targets)}) include no attention projection",
            where="targets",
            why="attention stays unchanged, and adapters on feed-forward layers alone learn less",
            fix=f"add {', '.join(sorted(attention))}, or use targets: all-linear",
        )


def _checkpointing(inputs: PlanInputs, memory: MemoryEstimate) -> Iterator[Finding]:
    policy = inputs.policy
    if policy == MemoryPolicy() and memory.kept_bytes > inputs.hardware.memory_bytes:
        yield _keep_too_large(memory, inputs.hardware)
    idle = _idle(policy) if policy and not inputs.on_cuda else []
    if idle:
        yield Finding(
            "P2",
            Severity.WARNING,
            f"memory_policy sets {', '.join(idle)}, which a CPU does not use",
            where="memory_policy",
            why="a CPU has one memory, and CUDA graphs need CUDA",
            fix="set memory_policy: auto, keep or recompute",
        )


def _keep_too_large(memory: MemoryEstimate, hardware: Hardware) -> Finding:
    return Finding(
        "P2",
        Severity.ERROR,
        f"memory_policy is keep, which needs about {at_least(memory.kept_bytes)} "
        f"of the available {at_most(hardware.memory_bytes)}",
        where="memory_policy",
        why="the run would run out of memory at its first full micro-batch",
        fix=f"set memory_policy: auto (recomputing every layer needs about {at_least(memory.recomputed_bytes)})",
    )


def _idle(policy: MemoryPolicy) -> list[str]:
    """Return the set fields of `policy` that have an effect only on a GPU."""
    fields = ("offloaded_layers", "dequantized_layers", "cuda_graph_max_tokens", "host_embeddings")
    return [key for key in fields if getattr(policy, key)]


def _precision(config: RunConfig, hardware: Hardware) -> Iterator[Finding]:
    half = "fp32" if config.method == "full" else "fp16"
    best = "fp32" if hardware.kind != "cuda" else "bf16" if hardware.bf16 else half
    for severity, message, why in (*_lacking(config, hardware), *_fp8(config, hardware)):
        fix = f"set compute: {best}, or leave it on auto"
        yield Finding("P3", severity, message, where="compute", why=why, fix=fix)


def _lacking(config: RunConfig, hardware: Hardware) -> Iterator[tuple[Severity, str, str]]:
    """Yield severity, message and reason for an unsuitable precision.

    The device lacks it, or it exceeds the base's.
    """
    cuda = hardware.kind == "cuda"
    if config.compute == "fp32" and config.quantization == "nf4" and cuda:
        yield (
            Severity.WARNING,
            f"compute is fp32 over a 4-bit base on {hardware.name}",
            "the weights have 4 bits, so fp32 adds no accuracy, leaves the tensor cores idle and doubles activations",
        )
    if config.compute == "bf16" and not hardware.bf16:
        yield (
            Severity.ERROR if cuda else Severity.WARNING,
            f"compute is bf16, and {hardware.name} does not support bf16",
            "emulated bf16 is many times slower" + (", and some kernels refuse it" if cuda else ""),
        )
    if config.compute == "fp16" and config.method == "full":
        why = "weights in fp16 lose small updates, and their gradients overflow"
        yield Severity.ERROR, "compute is fp16, and method is full", why
    elif config.compute == "fp16" and not cuda:
        why = "most CPUs emulate fp16, and its small range overflows"
        yield Severity.WARNING, "compute is fp16 on a CPU", why


def _fp8(config: RunConfig, hardware: Hardware) -> Iterator[tuple[Severity, str, str]]:
    """Yield the same for fp8, which needs a newer GPU, and a 4-bit base unless every weight trains."""
    if config.compute != "fp8":
        return
    if not hardware.fp8:
        why = "fp8 matmuls need Ada, Hopper or newer (capability 8.9), and cannot be emulated"
        yield Severity.ERROR, f"compute is fp8, and {hardware.name} does not support fp8", why
    elif config.quantization == "none" and config.method != "full":
        why = "fp8 weights are made from the 4-bit ones, block by block"
        yield Severity.ERROR, "compute is fp8, and quantization is none", why


def _dropout(config: RunConfig) -> Iterator[Finding]:
    if config.dropout > MAX_DROPOUT:
        yield Finding(
            "P4",
            Severity.WARNING,
            f"dropout is {config.dropout:g}",
            where="dropout",
            why="an adapter is small: above 0.1 it underfits, and training takes longer",
            fix="set dropout: 0.05, or 0.1 for few rows",
        )


def _serving(config: RunConfig) -> Iterator[Finding]:
    if config.goal == "latency" and config.serving == "adapters":
        yield Finding(
            "P6",
            Severity.WARNING,
            "the goal is latency, and serving is adapters",
            where="serving",
            why="an unmerged adapter adds two small matmuls for each token to every adapted layer",
            fix="set serving: merged, or goal: tenants if one base must serve several adapters",
        )


def _rank(inputs: PlanInputs) -> Iterator[Finding]:
    rank, rows = inputs.config.rank, inputs.stats.rows
    limit = rank_limit(rows)
    if rank > limit:
        yield Finding(
            "P7",
            Severity.WARNING,
            f"rank is {rank} for {rows:,} rows",
            where="rank",
            why=f"{rows:,} rows cannot fill more than rank {limit}, and the excess memorizes them",
            fix=f"set rank: {limit} (and alpha: {2 * limit}), or add rows",
        )
