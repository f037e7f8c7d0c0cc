"""Options: every row of the decision matrix priced for this data and hardware, the chosen one marked."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from lorafit.config import RunConfig
from lorafit.planning.facts import DataFacts
from lorafit.planning.forecast import forecast
from lorafit.planning.hardware import Hardware
from lorafit.planning.matrix import MATRIX, Rule
from lorafit.planning.shape import ModelShape


@dataclass(frozen=True, slots=True)
class Option:
    """One row of the matrix with what it would take here; ranges are (low, high), `rank` 0 means every weight.

    `peak_bytes` are those that it needs: graphs and unpacked weights, which take what is left over, are not among them.
    """

    method: str
    rank: int
    quantization: str
    when: str
    peak_bytes: int
    fits: bool
    hardware: str
    gpus: int
    time_s: tuple[float, float]
    cost_usd: tuple[float, float]
    chosen: bool

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready mapping."""
        fields = asdict(self)
        return fields | {
            "time_s": [round(bound, 1) for bound in self.time_s],
            "cost_usd": [round(bound, 4) for bound in self.cost_usd],
        }


def price_options(
    config: RunConfig, facts: DataFacts, shape: ModelShape, hardware: Hardware, chosen: Rule
) -> tuple[Option, ...]:
    """Memory, time and cost of every row of the matrix; `config` is the planned one, with the activations as they
    were asked for: each row puts its own where they fit."""
    return tuple(_option(rule, config, facts, shape, hardware, rule is chosen) for rule in MATRIX)


def _option(
    rule: Rule, config: RunConfig, facts: DataFacts, shape: ModelShape, hardware: Hardware, chosen: bool
) -> Option:
    settled = config if chosen else _with_rule(rule, config)
    run = forecast(shape, settled, hardware, facts, full=not rule.rank)
    return Option(
        method=rule.method,
        rank=rule.rank,
        quantization=rule.quantization,
        when=rule.when,
        peak_bytes=run.memory.needed_bytes,
        fits=run.memory.needed_bytes <= run.hardware.memory_bytes,
        hardware=run.hardware.name,
        gpus=run.gpus,
        time_s=run.duration.time_s,
        cost_usd=run.cost_usd,
        chosen=chosen,
    )


def _with_rule(rule: Rule, config: RunConfig) -> RunConfig:
    """`config` as this row would have it."""
    changes = {"rank": max(rule.rank, 1), "alpha": 2.0 * max(rule.rank, 1), "quantization": rule.quantization}
    return config.model_copy(update=changes)
