"""merge: one model out of a run, and the proof that it is the model that was trained."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np

from lorafit.adapters import Deltas, load_adapter
from lorafit.backbone import Onto, load_backbone, redirect_library_logs
from lorafit.config import RunDir
from lorafit.data import Record, Template, TextTokenizer, Turn
from lorafit.errors import AdapterError, UsageError, VerificationError
from lorafit.export import MergeReport, Verification, verify
from lorafit.export import merge as write_merged
from lorafit.findings import Finding, has_errors

VERIFIED_ROWS = 64

Row = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class MergedRun:
    """What was written and how it compares with the live adapter model."""

    report: MergeReport
    verification: Verification

    @property
    def folder(self) -> Path:
        return self.report.folder

    @property
    def findings(self) -> list[Finding]:
        return list(self.report.findings)

    @property
    def passed(self) -> bool:
        """False when the artefact is not the model that was trained."""
        return self.verification.passed and not has_errors(self.findings)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready mapping."""
        return {"passed": self.passed, "merge": self.report.to_dict(), "verification": self.verification.to_dict()}


def merge(run: str | Path, *, onto: Onto = "quantized", out: str | Path | None = None) -> MergedRun:
    """Merge the adapter of `run` into its base and verify the artefact from disk.

    `onto` "quantized" adds the delta to the dequantised 4-bit base, the model that was trained; "original" to the
    checkpoint as stored. The artefact gets its name once it is measured, also when it fails (`passed` False), for a
    look; a merge that is killed leaves at most a hidden folder, which the next one replaces.
    Raises UsageError, RunDirError, BackboneError, AdapterError, TemplateError or VerificationError.
    """
    if onto not in get_args(Onto):
        names = " or ".join(get_args(Onto))
        raise UsageError(f"'{onto!s:.40}' is nothing to merge onto", where="onto", fix=f"write {names}")
    folder = RunDir.open(Path(run))
    config = folder.config()
    with redirect_library_logs(folder.log, optional=True):
        check_adapter(folder)
        rows = verification_rows(folder, template_of(folder))
        fingerprint = folder.base_fingerprint()
        verified: list[Verification] = []

        def prove(staged: Path, onto: Onto) -> None:
            # before the folder has its name: one that looks finished and was never verified is worse than none
            live = load_adapter(load_backbone(config, exact=True), folder.adapter)
            verified.append(verify(live, staged, rows, onto))

        place = Path(out) if out else None
        report = write_merged(folder.path, onto=onto, out=place, fingerprint=fingerprint, prove=prove)
        return MergedRun(report, verified[0])


def check_adapter(run: RunDir) -> None:
    """AdapterError when the adapter on disk is not scaled as the run says."""
    config, deltas = run.config(), Deltas.from_folder(run.adapter)
    scale = config.alpha / config.rank
    for name, delta in deltas.items():
        if not math.isclose(delta.scale, scale, rel_tol=1e-6):
            what = f"{name} is scaled by {delta.scale:g}, and the run was trained with alpha / rank = {scale:g}"
            raise AdapterError(what, where=str(run.adapter), fix="restore adapter_config.json")


def template_of(run: RunDir) -> Template:
    """The template the run was trained with, its golden prompts asserted."""
    config = run.config()
    return Template.load(run.template, TextTokenizer.from_base(config.base, config.revision))


def verification_rows(run: RunDir, template: Template, limit: int = VERIFIED_ROWS) -> list[Row]:
    """The first held-out rows the run kept, tokenised as in training: (ids (tokens,), mask (tokens,))."""
    if not run.samples.is_file():
        raise VerificationError("the run kept no rows to verify on", where=str(run.samples), fix="train it again")
    lines = run.samples.read_text(encoding="utf-8", errors="replace").splitlines()[:limit]
    try:
        records = [_record(json.loads(line)) for line in lines]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        fix = "give the train command again, which writes it anew"
        raise VerificationError("the file is damaged", where=str(run.samples), fix=fix) from error
    encoded = template.encode_many(records)
    return [(np.array(one.ids, np.int32), np.array(one.mask, bool)) for one in encoded]


def _record(sample: dict[str, Any]) -> Record:
    turns = [Turn(m.pop("role"), m.pop("content"), m) for m in sample["messages"]]
    system = turns.pop(0).content if turns[0].role == "system" else None
    return Record(tuple(turns), sample["source"], system, tuple(sample.get("tools", ())))
