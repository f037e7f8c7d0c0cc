"""P0: a run that cannot finish on this hardware or base, and what would."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from typing import Any

from lorafit.config import RunConfig, parse_bytes
from lorafit.config.units import at_least, at_most
from lorafit.findings import Finding, Severity
from lorafit.hardware.catalogue import CARDS
from lorafit.hardware.device import GIB, Hardware, from_card
from lorafit.memory.estimate import MemoryEstimate, estimate_memory
from lorafit.memory.inputs import DataStats
from lorafit.memory.static_memory import compute_of
from lorafit.shapes.shape import ModelShape

FREEZABLE = (None, "nf4", "fp4")
TENTH = GIB // 10
"""Advice is given in tenths of a GiB, rounded up: what it says must really do."""


def obstacles(
    config: RunConfig, shape: ModelShape, hardware: Hardware, memory: MemoryEstimate, facts: DataStats
) -> Iterator[Finding]:
    """Everything that would stop the run: memory, a base of the wrong kind, rows beyond its positions."""
    yield from _kind(config, shape)
    yield from _positions(shape, facts)
    yield from _optimizer(config, hardware)
    yield from _budget(config, hardware)
    if not memory.fits(hardware):
        yield _too_large(config, shape, hardware, memory, facts)
    elif memory.peak_bytes * (1 + memory.uncertainty) > hardware.memory_bytes:
        yield _tight(config, shape, hardware, memory, facts)


def _kind(config: RunConfig, shape: ModelShape) -> Iterator[Finding]:
    """A base that is quantised already, or whose layers cannot be."""

    def stop(message: str, where: str, why: str, fix: str) -> Finding:
        return Finding("P0", Severity.ERROR, message, where=where, why=why, fix=fix)

    if shape.quantized not in FREEZABLE:
        why = "lorafit freezes 16-bit checkpoints, or 4-bit ones of bitsandbytes"
        seen = f"the base is already quantised with {shape.quantized:.40}"
        yield stop(seen, "base", why, "choose the base's 16-bit checkpoint")
    elif shape.quantized and config.quantization == "none":
        yield stop(
            f"the base is already in {shape.quantized}, and quantization is none",
            "quantization",
            "4-bit weights cannot be loaded as 16-bit ones",
            "set quantization: nf4, or choose the base's 16-bit checkpoint",
        )
    if shape.linear_class == "Conv1D" and config.quantization == "nf4":
        yield stop(
            f"{shape.family} keeps its projections in Conv1D layers, which are not supported in 4 bits",
            "quantization",
            "their weights lie transposed, and the 4-bit layer is a Linear",
            "set quantization: none, or choose a base with linear layers",
        )


def _positions(shape: ModelShape, facts: DataStats) -> Iterator[Finding]:
    if shape.max_positions and facts.longest > shape.max_positions:
        learned = shape.learned_positions
        yield Finding(
            "P0",
            Severity.ERROR if learned else Severity.WARNING,
            f"the longest row has {facts.longest:,} tokens, and the base was made for {shape.max_positions:,}",
            where="data",
            why="it has no positions beyond that" if learned else "it has never seen positions beyond that",
            fix=f"set max_tokens: {shape.max_positions} and long: drop, or choose a base with a longer context",
        )


def _optimizer(config: RunConfig, hardware: Hardware) -> Iterator[Finding]:
    if hardware.kind == "cpu" and config.optimizer not in ("auto", "adamw"):
        yield Finding(
            "P0",
            Severity.ERROR,
            f"the optimizer is {config.optimizer}, and there is no CUDA card",
            where="optimizer",
            why="the 8-bit optimizers are CUDA kernels",
            fix="set optimizer: adamw, or leave it on auto",
        )


def _budget(config: RunConfig, hardware: Hardware) -> Iterator[Finding]:
    """A budget beyond the device's memory, which stays the limit."""
    if config.vram and (budget := parse_bytes(config.vram, "vram")) > hardware.memory_bytes:
        there = at_most(hardware.memory_bytes)
        yield Finding(
            "P0",
            Severity.WARNING,
            f"vram is {at_least(budget)}, and {hardware.name} has {there}",
            where="vram",
            why=f"a budget cannot add memory: the plan is for {there}",
            fix="lower vram, leave it out, or name a larger card with gpu",
        )


def _there(config: RunConfig, hardware: Hardware) -> str:
    """The memory there is, and whose limit that is."""
    has = at_most(hardware.memory_bytes)
    if config.vram and parse_bytes(config.vram, "vram") <= hardware.memory_bytes:
        return f"vram allows {has}"
    return f"{hardware.name} has {has}"


def _too_large(
    config: RunConfig, shape: ModelShape, hardware: Hardware, memory: MemoryEstimate, facts: DataStats
) -> Finding:
    return Finding(
        "P0",
        Severity.ERROR,
        f"the run needs about {at_least(memory.peak_bytes)}, and {_there(config, hardware)}",
        where="memory",
        why="it would end in out-of-memory",
        fix=what_would_fit(config, shape, hardware, facts, memory.uncertainty),
    )


def _tight(
    config: RunConfig, shape: ModelShape, hardware: Hardware, memory: MemoryEstimate, facts: DataStats
) -> Finding:
    return Finding(
        "P0",
        Severity.WARNING,
        f"the run needs about {at_least(memory.peak_bytes)} ± {memory.uncertainty:.0%}, and {_there(config, hardware)}",
        where="memory",
        why="the estimate is not exact enough to promise that it fits",
        fix=what_would_fit(config, shape, hardware, facts, memory.uncertainty),
    )


def what_would_fit(
    config: RunConfig, shape: ModelShape, hardware: Hardware, facts: DataStats, margin: float = 0.0
) -> str:
    """The smallest change of settings that fits with the `margin` of the estimate to spare, else the memory, and the
    smallest card, that would do with all of them."""

    def fits(changes: dict[str, Any]) -> bool:
        return _peak(config, changes, shape, hardware, facts) * (1 + margin) <= hardware.memory_bytes

    remedies = list(_remedies(config, shape))
    for remedy in remedies:
        if fits(remedy):
            return f"set {_settings(remedy)}"
    together = {key: value for remedy in remedies for key, value in remedy.items()}
    for count in range(2, len(remedies) + 1):
        several = {key: value for remedy in remedies[:count] for key, value in remedy.items()}
        if fits(several):
            return f"set {_settings(several)}"
    return _more_memory(config, together, shape, hardware, facts, margin)


def _remedies(config: RunConfig, shape: ModelShape) -> Iterator[dict[str, Any]]:
    """Changes that save memory, the least painful first. Smaller micro-batches are among what activations on auto
    tries anyway."""
    auto = {key: "auto" for key in ("activations", "gradient_checkpointing") if getattr(config, key) != "auto"}
    if auto:
        yield auto
    if config.quantization == "none" and shape.quantized is None and shape.linear_class == "Linear":
        yield {"quantization": "nf4"}


def _more_memory(
    config: RunConfig, changes: dict[str, Any], shape: ModelShape, hardware: Hardware, facts: DataStats, margin: float
) -> str:
    def fits(tenths: int) -> bool:
        device = hardware.with_memory(tenths * TENTH)
        return _peak(config, changes, shape, device, facts) * (1 + margin) <= device.memory_bytes

    # what a run takes depends on what there is, so the least that does is searched for
    here, step = hardware.memory_bytes // TENTH, 1
    while not fits(here + step):
        step *= 2
    beyond = range(here + step // 2 + 1, here + step)
    enough = TENTH * (beyond.start + bisect_left(beyond, True, key=fits))
    card = _smallest_card(enough, compute_of(config, hardware)) if hardware.kind == "cuda" else None
    hint = f", as a card like '{card.name}' has" if card else ""
    with_changes = f" with {_settings(changes)}" if changes else ""
    if config.vram and parse_bytes(config.vram, "vram") <= hardware.memory_bytes:
        budget = at_least(enough).replace(" ", "").replace(",", "")
        return f"choose a smaller base, shorter rows, or vram: {budget}{with_changes}"
    return f"choose a smaller base, shorter rows, or {at_least(enough)} of memory{with_changes}{hint}"


def _smallest_card(size_bytes: int, compute: str) -> Hardware | None:
    """The card with the least memory that has this much, and computes so; None when there is none."""
    cards = sorted((from_card(card) for card in CARDS), key=lambda card: card.memory_bytes)
    able = [card for card in cards if {"bf16": card.bf16, "fp8": card.fp8}.get(compute, True)]
    return next((card for card in able if card.memory_bytes >= size_bytes), None)


def _peak(config: RunConfig, changes: dict[str, Any], shape: ModelShape, hardware: Hardware, facts: DataStats) -> int:
    changed = config.model_copy(update=changes)
    return estimate_memory(shape, changed, hardware, facts).peak_bytes


def _settings(changes: dict[str, Any]) -> str:
    return " and ".join(f"{key}: {value}" for key, value in changes.items())
