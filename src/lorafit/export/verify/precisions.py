"""precisions: the task loss of a merged model in 16 bits and in NF4, and what it is good for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lorafit.config import MergeBase, read_json
from lorafit.errors import VerificationError
from lorafit.export.verify.comparison import Comparison
from lorafit.export.verify.engines import CARD
from lorafit.export.verify.verification import LOSS_MARGIN, VERIFICATION_FILE, Verification
from lorafit.runs import write_text

NF4 = "nf4"
AS_GOOD = 0.02
"""Nats of task loss by which the original base may be worse and still be chosen."""


@dataclass(frozen=True)
class PrecisionRow:
    """Hold the comparison of one merged model, in one precision, with the live model.

    Attributes:
        onto: the base that the delta was added to.
        precision: bfloat16, float16, float32 or nf4.
        measured: loss, KL and top-1 agreement.
    """

    onto: MergeBase
    precision: str
    measured: Comparison

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready mapping."""
        return {"onto": self.onto, "precision": self.precision, **asdict(self.measured)}


@dataclass(frozen=True)
class Precisions:
    """Hold the choice of a base to merge onto, and the measurements behind it.

    Attributes:
        onto: the chosen base.
        reason: why, in one clause.
        live_loss: the task loss of base and adapter.
        rows: the measurements; those of the other base only if there was a choice.
    """

    onto: MergeBase
    reason: str
    live_loss: float
    rows: tuple[PrecisionRow, ...]

    @property
    def good_for(self) -> list[str]:
        """Return the precisions in which the chosen model does the task as base and adapter do."""
        return [
            row.precision
            for row in self.rows
            if row.onto == self.onto and row.measured.loss <= self.live_loss + LOSS_MARGIN
        ]

    @property
    def sentence(self) -> str:
        """Return the choice, its reason, and the precisions to serve in."""
        nf4 = next((row for row in self.rows if row.onto == self.onto and row.precision == NF4), None)
        chosen = self.reason if self.onto == "whole" else f"onto the {self.onto} base: {self.reason}"
        if nf4 is None:
            return chosen
        if NF4 in self.good_for:
            return f"{chosen}; good in 16 bits and in NF4 (task loss {nf4.measured.loss:.3f})"
        lost = f"in NF4 the task loss is {nf4.measured.loss:.3f} instead of {self.live_loss:.3f}"
        return f"{chosen}; serve it in 16 bits, or base and adapter: {lost}"

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready mapping."""
        return {
            "decision": {"onto": self.onto, "reason": self.reason},
            "good_for": self.good_for,
            "precisions": [row.to_dict() for row in self.rows],
        }

    def record(self, folder: Path, **more: Any) -> None:
        """Write the measurements, and `more`, into verification.json and onto the model card of `folder`."""
        path = folder / VERIFICATION_FILE
        content: dict[str, Any] = read_json(path, VerificationError, fix="merge the run again")
        write_text(path, json.dumps(content | self.to_dict() | more, indent=2, ensure_ascii=False) + "\n")
        table = "\n".join(
            f"| {row.onto} | {row.precision} | {row.measured.loss:.4f} | {row.measured.kl:.2e} |" for row in self.rows
        )
        card = folder / CARD
        before = card.read_text(encoding="utf-8").rstrip("\n")
        head = "| merged onto | precision | task loss | KL to the trained model |\n|---|---|---|---|"
        said = f"{self.sentence[0].upper()}{self.sentence[1:]}."
        card.write_text(f"{before}\n\n## Serving precision\n{said}\n\n{head}\n{table}\n", encoding="utf-8")


def of_the_quantized(verification: Verification) -> PrecisionRow:
    """Return the row of base and adapter in the artefact's precision: a merge onto quantized, before it is written."""
    same = verification.live_dtype == verification.merged_dtype
    measured = Comparison(0.0, 1.0, verification.live_loss) if same else verification.floor
    return PrecisionRow("quantized", verification.merged_dtype, measured)


def reason_for(chosen: MergeBase, rows: Sequence[PrecisionRow]) -> str:
    """Return why `chosen` was preferred, with the losses of both bases."""
    losses = {(row.onto, row.precision == NF4): row.measured.loss for row in rows}
    other: MergeBase = "quantized" if chosen == "original" else "original"
    ours, theirs = losses[chosen, False], losses[other, False]
    word = "as good as" if chosen == "original" else "better than"
    return f"task loss {ours:.3f} in 16 bits, {word} {theirs:.3f} onto the {other} base"
