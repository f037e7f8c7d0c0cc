"""The decision matrix: rows of data and the goal of the run → method, rank and base precision. One table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from lorafit.config.run_config import Goal
from lorafit.memory.inputs import PlanInputs
from lorafit.planning.forecast import forecast

Method = Literal["QLoRA", "LoRA", "full fine-tuning"]


@dataclass(frozen=True, slots=True)
class Case:
    """Hold the matrix's question: training rows, the goal, and whether a 16-bit base would fit."""

    rows: int
    goal: Goal
    fits_16bit: bool


@dataclass(frozen=True, slots=True)
class Rule:
    """Hold one row of the matrix: its condition and its choice.

    It applies from `least` to `most` rows, for `goal` (None: any), and with `needs_16bit` only if the base fits in 16
    bits.
    """

    method: Method
    rank: int
    quantization: Literal["nf4", "none"]
    rank_reason: str
    base_reason: str
    least: int = 0
    most: int | None = None
    goal: Goal | None = None
    needs_16bit: bool = False

    def holds(self, case: Case) -> bool:
        """Whether this row speaks for `case`; the first one that does decides."""
        enough = case.rows >= self.least and (self.most is None or case.rows <= self.most)
        return enough and self.goal in (None, case.goal) and (case.fits_16bit or not self.needs_16bit)

    @property
    def when(self) -> str:
        """The row's condition in words."""
        if self.most is None:
            rows = f"more than {self.least - 1:,} rows" if self.least else "any number of rows"
        else:
            rows = f"{self.least:,} to {self.most:,} rows" if self.least else f"up to {self.most:,} rows"
        goal = f", goal {self.goal}" if self.goal else ""
        return rows + goal + (", 16-bit base fits" if self.needs_16bit else "")


SMALL, MEDIUM, HUGE = 5_000, 50_000, 100_000
"""Rows: below SMALL a little data, up to MEDIUM the usual amount, above HUGE enough for every weight."""

MATRIX: tuple[Rule, ...] = (
    Rule("full fine-tuning", 0, "none", "every weight trains", "nothing is frozen, so nothing is quantised",
         least=HUGE + 1, goal="accuracy"),
    Rule("QLoRA", 8, "nf4", "a strict budget: the smallest adapter that learns",
         "a strict budget: a 4-bit base needs the smallest card", goal="budget"),
    Rule("QLoRA", 8, "nf4", "so few rows would be memorised by a larger adapter",
         "a 4-bit base loses less than so few rows can teach", most=SMALL - 1),
    Rule("LoRA", 16, "none", "the usual amount of data", "the base fits in 16 bits, so nothing is lost to quantisation",
         least=SMALL, most=MEDIUM, needs_16bit=True),
    Rule("QLoRA", 16, "nf4", "the usual amount of data", "the base does not fit in 16 bits",
         least=SMALL, most=MEDIUM),
    Rule("LoRA", 32, "none", "so many rows can fill a larger adapter",
         "the base fits in 16 bits, so nothing is lost to quantisation", least=MEDIUM + 1, needs_16bit=True),
    Rule("QLoRA", 32, "nf4", "so many rows can fill a larger adapter", "the base does not fit in 16 bits",
         least=MEDIUM + 1),
)  # fmt: skip

SERVING: Mapping[Goal, tuple[Literal["merged", "adapters"], str]] = {
    "latency": ("merged", "one model with the adapter merged in answers fastest"),
    "tenants": ("adapters", "one base in memory serves many small adapters"),
}
DEFAULT_SERVING: tuple[Literal["merged", "adapters"], str] = ("merged", "one model, served by anything")


def choose(case: Case) -> Rule:
    """The first row of the matrix that holds."""
    rule = next((rule for rule in MATRIX if rule.holds(case)), None)
    assert rule is not None, case
    return rule


def rank_limit(rows: int) -> int:
    """The largest rank that so many rows can fill: 8 below 5,000, 16 to 50,000, 32 above."""
    return choose(Case(rows, "balanced", False)).rank


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


def price_options(inputs: PlanInputs, chosen: Rule) -> tuple[Option, ...]:
    """Price every row of the matrix in memory, time and cost.

    `inputs` hold the planned settings, but the memory policy that was asked for: each row chooses its own.
    """
    return tuple(_option(rule, inputs, rule is chosen) for rule in MATRIX)


def _option(rule: Rule, inputs: PlanInputs, chosen: bool) -> Option:
    rank = max(rule.rank, 1)
    changes = {"rank": rank, "alpha": 2.0 * rank, "quantization": rule.quantization}
    run = forecast(inputs if chosen else inputs.with_settings(**changes), full=not rule.rank)
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
