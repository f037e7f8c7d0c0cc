"""TrainedRun: what `train` gives back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lorafit.config import Resolved
from lorafit.data import Rows, Template
from lorafit.findings import Finding
from lorafit.methods.lora import Counts
from lorafit.runs import RunDir


@dataclass(frozen=True)
class TrainedRun:
    """A finished run: its directory, the live model, and what it took."""

    run: RunDir
    resolved: Resolved
    model: Any
    template: Template
    train_rows: Rows
    held_out_rows: Rows
    findings: list[Finding]
    counts: Counts
    steps: int
    tokens: int
    train_s: float
    loss: float
    eval_loss: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready mapping."""
        return {
            "run": str(self.run.path),
            "steps": self.steps,
            "train_rows": len(self.train_rows),
            "held_out_rows": len(self.held_out_rows),
            "loss": self.loss,
            "eval_loss": self.eval_loss,
            "train_s": round(self.train_s, 2),
            "tokens_per_s": round(self.tokens / max(self.train_s, 1e-9)),
            "trainable_parameters": self.counts.trainable,
            "total_parameters": self.counts.total,
            "findings": [finding.to_dict() for finding in self.findings],
        }
