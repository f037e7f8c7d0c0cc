"""The decision matrix: rows of data and the goal of the run → method, rank and base precision. One table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from lorafit.config.run_config import Goal

Method = Literal["QLoRA", "LoRA", "full fine-tuning"]


@dataclass(frozen=True, slots=True)
class Case:
    """What the matrix is asked about: training rows, the goal, and whether a 16-bit base would fit."""

    rows: int
    goal: Goal
    fits_16bit: bool


@dataclass(frozen=True, slots=True)
class Rule:
    """One row of the matrix. It holds from `least` to `most` rows, for `goal` (None: any), and where
    `needs_16bit`, only if the base fits in 16 bits."""

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
    Rule("QLoRA", 8, "nf4", "a larger adapter would learn so few rows by heart",
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
