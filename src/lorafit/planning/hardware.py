"""Hardware: the card or the processor that a run is planned for, found or named."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, replace
from typing import Any, Literal

from lorafit.errors import UsageError
from lorafit.planning.cards import CARDS, Card
from lorafit.planning.size import size_in_words

GIB = 1 << 30
CORE_PEAK_GFLOPS = 100.0
"""ASSUMED fp32 peak of one core in GFLOP/s: AVX2 with two FMA units at 3 GHz. It stands beside a card's data sheet."""
CORE_GFLOPS_RANGE = (25.0, 60.0)
"""fp32 GFLOP/s of one core in training: the 3.5 M-parameter demo base ran 4–8 k tokens/s on two. A time is a range."""
CORE_GFLOPS = 40.0
"""One value within CORE_GFLOPS_RANGE, where settings are compared and a range has no order."""
LEAST_HOST_BYTES = 8 * GIB
"""ASSUMED of a host that is not this one: memory to pin for activations, at least; else as much as the card has."""
DRIVER_SHARE = 0.02
"""Share of a card's memory that its driver keeps: what nvidia-smi reports less what torch can reach."""


@dataclass(frozen=True, slots=True)
class Hardware:
    """One device. `memory_bytes` is what a run may use, `tflops_bf16` the dense 16-bit matmul peak in TFLOP/s.

    `bandwidth_gbs` is to its own memory and `link_gbs` to the host, in GB/s each way; `usd_per_hour` is a range
    (low, high), assumed. `cores` counts the processor cores that a run may use; `count` the like devices seen.
    `host_bytes` of the host's memory may be pinned for activations.
    """

    name: str
    kind: Literal["cuda", "cpu"]
    memory_bytes: int
    capability: tuple[int, int] | None = None
    bf16: bool = False
    fp8: bool = False
    tflops_bf16: float = 0.0
    bandwidth_gbs: float = 0.0
    link_gbs: float = 0.0
    usd_per_hour: tuple[float, float] = (0.0, 0.0)
    cores: int = 1
    count: int = 1
    host_bytes: int = 0
    notes: tuple[str, ...] = ()

    def with_memory(self, memory_bytes: int) -> Hardware:
        """The same device with another memory budget: what `--vram` asks for."""
        return replace(self, memory_bytes=memory_bytes)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready mapping."""
        return {
            "name": self.name,
            "kind": self.kind,
            "memory_bytes": self.memory_bytes,
            "capability": list(self.capability) if self.capability else None,
            "bf16": self.bf16,
            "fp8": self.fp8,
            "tflops_bf16": self.tflops_bf16,
            "bandwidth_gbs": self.bandwidth_gbs,
            "link_gbs": self.link_gbs,
            "usd_per_hour": list(self.usd_per_hour),
            "cores": self.cores,
            "count": self.count,
            "host_bytes": self.host_bytes,
            "notes": list(self.notes),
        }


def hardware_named(name: str) -> Hardware:
    """The card people call `name`: `RTX 4090`, `h100`, `NVIDIA A100-SXM4-80GB`. Raises UsageError for others."""
    card = find_card(name)
    if card is None:
        fix = f"did you mean '{_nearest(name)}'? For another card, pass --vram with its memory"
        raise UsageError(f"no card '{name:.60}' is known", where="gpu", fix=fix)
    return from_card(card)


def find_card(name: str) -> Card | None:
    """The table's row for a card as its maker, driver or owner writes it; None when there is none."""
    return _BY_KEY.get(_key(name))


def from_card(card: Card) -> Hardware:
    """The hardware that a row of the table describes."""
    major, minor = card.capability
    memory = round((card.memory_mib << 20) * (1 - DRIVER_SHARE))
    return Hardware(
        name=card.name,
        kind="cuda",
        memory_bytes=memory,
        host_bytes=max(LEAST_HOST_BYTES, memory),
        capability=card.capability,
        bf16=major >= 8,
        fp8=(major, minor) >= (8, 9),
        tflops_bf16=card.tflops,
        bandwidth_gbs=card.bandwidth_gbs,
        link_gbs=card.link_gbs,
        usd_per_hour=card.usd_per_hour,
    )


def generic_card(memory_bytes: int, capability: tuple[int, int] | None = None) -> Hardware:
    """A card that is not in the table: this much memory, and the speed of a small card of its time, assumed."""
    capability = capability or (8, 6)
    return Hardware(
        name=f"card with {size_in_words(memory_bytes)}",
        kind="cuda",
        memory_bytes=memory_bytes,
        host_bytes=max(LEAST_HOST_BYTES, memory_bytes),
        capability=capability,
        bf16=capability >= (8, 0),
        fp8=capability >= (8, 9),
        tflops_bf16=30.0,
        bandwidth_gbs=300.0,
        link_gbs=12.0,
        usd_per_hour=(0.05, 0.50),
        notes=("no data sheet for this card: its speed and price are assumed, its memory is not",),
    )


def _nearest(name: str) -> str:
    """The name in the table that looks most like `name`, as its key or as it is written."""
    names = {card.name.lower(): card.name for card in CARDS}
    near = difflib.get_close_matches(_key(name), _BY_KEY, n=1, cutoff=0.6)
    if near:
        return _BY_KEY[near[0]].name
    return names[(difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.0))[0]]


def _key(name: str) -> str:
    """`NVIDIA GeForce RTX 4090` and `rtx-4090` are one card."""
    text = re.sub(r"[^a-z0-9]+", " ", name.lower())
    text = re.sub(r"\b(mobile|with max q design)\b", "laptop", text)
    text = re.sub(r"\b(nvidia|geforce|tesla|quadro|gpu|graphics|generation|gen)\b", " ", text)
    text = re.sub(r"\b(\d+)\s*(gib|gb|g)\b", r"\1gb", text)
    return re.sub(r"^rtx(?=\d{4}(?!ada))", "", text.replace(" ", ""))


_BY_KEY = {_key(name): card for card in reversed(CARDS) for name in (card.name, *card.aliases)}
