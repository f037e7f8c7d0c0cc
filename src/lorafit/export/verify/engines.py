"""engines: the verdict on an export in each program that serves it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from lorafit.config import read_json
from lorafit.errors import VerificationError
from lorafit.export.verify.answers import Answers
from lorafit.export.verify.verification import VERIFICATION_FILE, Verification
from lorafit.runs import write_text

Status = Literal["proved", "not proved", "failed"]
CARD = "README.md"


@dataclass(frozen=True)
class Prompts:
    """Hold counts of prompts.

    Attributes:
        total: golden prompts of the run, and prompts of held-out rows.
        equal: prompts whose token ids equal training's.
    """

    total: int
    equal: int

    @classmethod
    def of(cls, found: Sequence[Sequence[int]], trained: Sequence[Sequence[int]]) -> Prompts:
        """Compare the token ids of prompts with training's."""
        return cls(len(trained), sum(list(ours) == list(ids) for ours, ids in zip(found, trained, strict=True)))

    @property
    def sentence(self) -> str:
        """Return the counts as text."""
        return f"{self.equal} of {self.total} prompts have the trained ids"


@dataclass(frozen=True)
class EngineProof:
    """Hold the verdict on an export in one program.

    Attributes:
        engine: the program's name.
        status: proved, not proved (the program is not here), or failed.
        reason: why, in one sentence.
        prompts: prompt ids in this program against training's; None where it is not here.
        answers: greedy answers in this program against the live model's; None where it is not here.
    """

    engine: str
    status: Status
    reason: str
    prompts: Prompts | None = None
    answers: Answers | None = None

    @classmethod
    def of(cls, engine: str, prompts: Prompts, verification: Verification, answers: Answers) -> EngineProof:
        """Judge prompt ids, probabilities and greedy answers together."""
        good = prompts.equal == prompts.total and verification.passed and not answers.worse
        said = f"{prompts.sentence}; {answers.sentence}; {verification.reason}"
        return cls(engine, "proved" if good else "failed", said, prompts, answers)

    @classmethod
    def absent(cls, engine: str, fix: str) -> EngineProof:
        """Return the verdict for a program that is not installed."""
        return cls(engine, "not proved", fix)

    @property
    def sentence(self) -> str:
        """Return engine, status and reason as one line."""
        return f"{self.status} in {self.engine}: {self.reason}"


def record_proofs(folder: Path, proofs: Sequence[EngineProof]) -> None:
    """Write `proofs` into verification.json and onto the model card of `folder`."""
    path = folder / VERIFICATION_FILE
    measured: dict[str, Any] = read_json(path, VerificationError, fix="export the run again")
    content = measured | {"engines": [asdict(proof) for proof in proofs]}
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    card = folder / CARD
    rows = "\n".join(f"| {proof.engine} | {proof.status} | {proof.reason} |" for proof in proofs)
    before = card.read_text(encoding="utf-8") if card.is_file() else ""
    table = f"\n## Verification\n| engine | verdict | reason |\n|---|---|---|\n{rows}\n"
    card.write_text(before.rstrip("\n") + "\n" + table, encoding="utf-8")
