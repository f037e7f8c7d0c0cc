"""The classic pitfalls of a LoRA run, P1 to P7 (P5, mixed templates, is judged from the data by `data/`)."""

from __future__ import annotations

from collections.abc import Iterator

from lorafit.config import RunConfig
from lorafit.findings import Finding, Severity
from lorafit.planning.facts import DataFacts
from lorafit.planning.hardware import GIB, Hardware
from lorafit.planning.matrix import rank_limit
from lorafit.planning.memory import MemoryEstimate
from lorafit.planning.shape import ModelShape

MAX_DROPOUT = 0.1


def pitfalls(
    config: RunConfig,
    shape: ModelShape,
    hardware: Hardware,
    memory: MemoryEstimate,
    facts: DataFacts,
    targets: tuple[str, ...],
) -> list[Finding]:
    """What a run with these settings would regret, in the order of the codes. `config` is the planned one."""
    return [
        *_no_attention(shape, targets),
        *_checkpointing(config, hardware, memory),
        *_precision(config, hardware),
        *_dropout(config),
        *_serving(config),
        *_rank(config, facts),
    ]


def _no_attention(shape: ModelShape, targets: tuple[str, ...]) -> Iterator[Finding]:
    leaves = {name.rpartition(".")[2] for name in targets}
    attention = {linear.name for linear in shape.linears if linear.is_attention}
    if not leaves & attention:
        yield Finding(
            "P1",
            Severity.WARNING,
            f"no attention projection among the targets ({', '.join(targets)})",
            where="targets",
            why="what a token looks at stays as it was: adapters on the feed-forward layers alone learn less",
            fix=f"add {', '.join(sorted(attention))}, or use targets: all-linear",
        )


def _checkpointing(config: RunConfig, hardware: Hardware, memory: MemoryEstimate) -> Iterator[Finding]:
    room = hardware.memory_bytes
    if config.gradient_checkpointing == "off" and memory.kept_bytes > room:
        yield Finding(
            "P2",
            Severity.ERROR,
            f"gradient checkpointing is off, and keeping every activation needs about {_gib(memory.kept_bytes)} "
            f"of the {_gib(room)} there are",
            where="gradient_checkpointing",
            why="the run would end in out-of-memory at its first full micro-batch",
            fix=f"set gradient_checkpointing: on (about {_gib(memory.recomputed_bytes)})",
        )
    if config.gradient_checkpointing == "reentrant":
        yield Finding(
            "P2",
            Severity.WARNING,
            "gradient checkpointing is reentrant",
            where="gradient_checkpointing",
            why="over a frozen base the reentrant kind loses the gradient of the first adapters unless the input "
            "is made to require one, and it breaks with several GPUs",
            fix="set gradient_checkpointing: on, which is the non-reentrant kind",
        )


def _precision(config: RunConfig, hardware: Hardware) -> Iterator[Finding]:
    cuda = hardware.kind == "cuda"
    best = "fp32" if not cuda else "bf16" if hardware.bf16 else "fp16"

    def judged(severity: Severity, message: str, why: str) -> Finding:
        fix = f"set compute: {best}, or leave it on auto"
        return Finding("P3", severity, message, where="compute", why=why, fix=fix)

    if config.compute == "fp32" and config.quantization == "nf4" and cuda:
        yield judged(
            Severity.WARNING,
            f"matmuls in fp32 over a 4-bit base on {hardware.name}",
            "the weights carry 4 bits, so fp32 adds no accuracy, leaves the tensor cores idle and doubles activations",
        )
    if config.compute == "bf16" and not hardware.bf16:
        yield judged(
            Severity.ERROR if cuda else Severity.WARNING,
            f"compute is bf16, and {hardware.name} has no bf16 arithmetic",
            "it would be emulated: many times slower" + (", and some kernels refuse it" if cuda else ""),
        )
    if config.compute == "fp16" and not cuda:
        why = "few CPUs multiply in fp16: it is emulated, and its small range overflows"
        yield judged(Severity.WARNING, "compute is fp16 on a CPU", why)


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


def _rank(config: RunConfig, facts: DataFacts) -> Iterator[Finding]:
    limit = rank_limit(facts.rows)
    if config.rank > limit:
        yield Finding(
            "P7",
            Severity.WARNING,
            f"rank {config.rank} for {facts.rows:,} rows",
            where="rank",
            why=f"so few rows cannot fill more than rank {limit}: the rest learns them by heart",
            fix=f"set rank: {limit} (and alpha: {2 * limit}), or bring more rows",
        )


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / GIB:.1f} GiB"
