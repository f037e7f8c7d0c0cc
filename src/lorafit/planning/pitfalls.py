"""The classic pitfalls of a LoRA run, P1 to P7 (P5, mixed templates, is judged from the data by `data/`)."""

from __future__ import annotations

from collections.abc import Iterator

from lorafit.config import RunConfig
from lorafit.config.memory_policy import MemoryPolicy
from lorafit.config.units import at_least, at_most
from lorafit.findings import Finding, Severity
from lorafit.hardware import Hardware
from lorafit.memory.estimate import MemoryEstimate
from lorafit.memory.inputs import PlanInputs
from lorafit.planning.matrix import rank_limit

MAX_DROPOUT = 0.1


def pitfalls(inputs: PlanInputs, memory: MemoryEstimate) -> list[Finding]:
    """Find everything that a run with these settings would regret, in the order of the codes."""
    return [
        *_no_attention(inputs),
        *_checkpointing(inputs, memory),
        *_precision(inputs.config, inputs.hardware),
        *_dropout(inputs.config),
        *_serving(inputs.config),
        *_rank(inputs),
    ]


def _no_attention(inputs: PlanInputs) -> Iterator[Finding]:
    leaves = {name.rpartition(".")[2] for name in inputs.targets}
    attention = {linear.name for linear in inputs.shape.linears if linear.is_attention}
    if not leaves & attention:
        yield Finding(
            "P1",
            Severity.WARNING,
            f"no attention projection among the targets ({', '.join(inputs.targets)})",
            where="targets",
            why="what a token looks at stays as it was: adapters on the feed-forward layers alone learn less",
            fix=f"add {', '.join(sorted(attention))}, or use targets: all-linear",
        )


def _checkpointing(inputs: PlanInputs, memory: MemoryEstimate) -> Iterator[Finding]:
    policy = inputs.policy
    if policy == MemoryPolicy() and memory.kept_bytes > inputs.hardware.memory_bytes:
        yield _kept(memory, inputs.hardware)
    idle = _idle(policy) if policy and not inputs.on_cuda else []
    if idle:
        yield Finding(
            "P2",
            Severity.WARNING,
            f"activations ask for {', '.join(idle)}, and a CPU has no use for them",
            where="memory_policy",
            why="a CPU has one memory, and CUDA graphs need CUDA",
            fix="set memory_policy: auto, keep or recompute",
        )


def _kept(memory: MemoryEstimate, hardware: Hardware) -> Finding:
    return Finding(
        "P2",
        Severity.ERROR,
        f"activations are kept, and keeping every activation needs about {at_least(memory.kept_bytes)} "
        f"of the {at_most(hardware.memory_bytes)} there are",
        where="memory_policy",
        why="the run would end in out-of-memory at its first full micro-batch",
        fix=f"set memory_policy: auto (recomputing every layer needs about {at_least(memory.recomputed_bytes)})",
    )


def _idle(policy: MemoryPolicy) -> list[str]:
    """Return the fields of `policy` that mean something on a GPU alone."""
    fields = ("offloaded_layers", "dequantized_layers", "cuda_graph_max_tokens", "host_embeddings")
    return [key for key in fields if getattr(policy, key)]


def _precision(config: RunConfig, hardware: Hardware) -> Iterator[Finding]:
    best = "fp32" if hardware.kind != "cuda" else "bf16" if hardware.bf16 else "fp16"
    for severity, message, why in (*_lacking(config, hardware), *_fp8(config, hardware)):
        fix = f"set compute: {best}, or leave it on auto"
        yield Finding("P3", severity, message, where="compute", why=why, fix=fix)


def _lacking(config: RunConfig, hardware: Hardware) -> Iterator[tuple[Severity, str, str]]:
    """Severity, message and reason where a precision is not the device's, or more than the base has."""
    cuda = hardware.kind == "cuda"
    if config.compute == "fp32" and config.quantization == "nf4" and cuda:
        yield (
            Severity.WARNING,
            f"matmuls in fp32 over a 4-bit base on {hardware.name}",
            "the weights carry 4 bits, so fp32 adds no accuracy, leaves the tensor cores idle and doubles activations",
        )
    if config.compute == "bf16" and not hardware.bf16:
        yield (
            Severity.ERROR if cuda else Severity.WARNING,
            f"compute is bf16, and {hardware.name} has no bf16 arithmetic",
            "it would be emulated: many times slower" + (", and some kernels refuse it" if cuda else ""),
        )
    if config.compute == "fp16" and not cuda:
        why = "few CPUs multiply in fp16: it is emulated, and its small range overflows"
        yield Severity.WARNING, "compute is fp16 on a CPU", why


def _fp8(config: RunConfig, hardware: Hardware) -> Iterator[tuple[Severity, str, str]]:
    """The same for fp8, which only newer cards have, over a 4-bit base."""
    if config.compute != "fp8":
        return
    if not hardware.fp8:
        why = "fp8 matmuls begin with Ada and Hopper (capability 8.9); there is no slower way round"
        yield Severity.ERROR, f"compute is fp8, and {hardware.name} has no fp8 arithmetic", why
    elif config.quantization == "none":
        why = "fp8 weights are made from the 4-bit ones, block by block"
        yield Severity.ERROR, "compute is fp8, and quantization is none", why


def _dropout(config: RunConfig) -> Iterator[Finding]:
    if config.dropout > MAX_DROPOUT:
        yield Finding(
            "P4",
            Severity.WARNING,
            f"dropout is {config.dropout:g}",
            where="dropout",
            why="an adapter is small already: above 0.1 it underfits, and training takes longer",
            fix="set dropout: 0.05, or 0.1 for few rows",
        )


def _serving(config: RunConfig) -> Iterator[Finding]:
    if config.goal == "latency" and config.serving == "adapters":
        yield Finding(
            "P6",
            Severity.WARNING,
            "the goal is latency, and the adapter is to be served unmerged",
            where="serving",
            why="every adapted layer then does two more small matmuls for each token",
            fix="set serving: merged, or goal: tenants if one base must serve several adapters",
        )


def _rank(inputs: PlanInputs) -> Iterator[Finding]:
    rank, rows = inputs.config.rank, inputs.stats.rows
    limit = rank_limit(rows)
    if rank > limit:
        yield Finding(
            "P7",
            Severity.WARNING,
            f"rank {rank} for {rows:,} rows",
            where="rank",
            why=f"so few rows cannot fill more than rank {limit}: the rest learns them by heart",
            fix=f"set rank: {limit} (and alpha: {2 * limit}), or bring more rows",
        )
