"""importance: K-quants with an importance matrix of the run's rows, and without one, measured against each other."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from torch import nn

from lorafit.data import prepare
from lorafit.errors import LorafitError
from lorafit.export import Row
from lorafit.export.finished_run import FinishedRun
from lorafit.export.formats import Gguf
from lorafit.export.importance import input_squares
from lorafit.export.verify.comparison import Comparison

ROWS, LONGEST = 64, 2048
"""Training rows of an importance matrix, evenly from all, and most tokens of each."""


@dataclass
class Weighing:
    """Hold the source of an importance matrix, and its effect on a file.

    Attributes:
        rows: training rows.
        tokens: positions of them that predict a supervised token.
        problem: why there is no matrix; None if there is one.
        without: the file without the matrix, against the live model on held-out rows.
        with_it: the file with the matrix; None until it is measured.
    """

    rows: int = 0
    tokens: int = 0
    problem: str | None = None
    without: Comparison | None = None
    with_it: Comparison | None = None

    @property
    def helps(self) -> bool:
        """Return True if the matrix lowers the KL on held-out rows."""
        return self.with_it is not None and self.without is not None and self.with_it.kl < self.without.kl

    @property
    def sentence(self) -> str:
        """Return the choice and its reason."""
        if self.with_it is None or self.without is None:
            return f"no importance matrix: {self.problem}"
        words = "with an importance matrix of" if self.helps else "without an importance matrix, as one of"
        ours, other = (self.with_it.kl, self.without.kl) if self.helps else (self.without.kl, self.with_it.kl)
        return f"{words} {self.rows} training rows (KL {ours:.1e}, and {other:.1e} the other way)"

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready mapping."""
        rows = {"with": self.with_it, "without": self.without}
        found = {name: None if one is None else asdict(one) for name, one in rows.items()}
        used = {"rows": self.rows, "tokens": self.tokens, "used": self.helps}
        return {"importance": used | found | ({"problem": self.problem} if self.problem else {})}


def weighed(run: FinishedRun, live: nn.Module, form: Gguf) -> tuple[Gguf, Weighing]:
    """Return `form` with an importance matrix of the run's training rows, and the matrix's source.

    `form` stays as it is if the rows are not at hand.
    """
    try:
        kept = prepare(run.config, run.template).train
    except LorafitError as error:
        return form, Weighing(problem=f"the training rows are not at hand ({error.what})")
    chosen = np.unique(np.linspace(0, len(kept) - 1, min(ROWS, len(kept))).astype(int)).tolist() if len(kept) else []
    every = [Row(kept.ids(place)[:LONGEST], kept.mask(place)[:LONGEST]) for place in chosen]
    rows = [row for row in every if len(row.predicting)]
    if not rows:
        return form, Weighing(problem="no training row has a response")
    tokens = sum(len(row.predicting) for row in rows)
    return replace(form, importance=input_squares(live, rows)), Weighing(len(rows), tokens)
