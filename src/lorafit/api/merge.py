"""merge: write one model from a run, and verify that it is the trained model."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lorafit.api.ship.finishing import Finishing
from lorafit.api.ship.merge_proof import MergeProof, NotAsGood
from lorafit.backbone import redirect_library_logs
from lorafit.config import MERGE_BASES, MergeBase, base_folder
from lorafit.data import Record, Template, TextTokenizer
from lorafit.errors import UsageError, VerificationError
from lorafit.export import DEFAULT_FORMAT, ExportFormat, MergeReport, Row, Verification, format_named
from lorafit.export import merge as write_merged
from lorafit.export.finished_run import FinishedRun
from lorafit.export.formats import Gguf
from lorafit.export.verify import EngineProof, Precisions
from lorafit.findings import Finding, has_errors
from lorafit.runs import LAST, RunDir

VERIFIED_ROWS = 64
LEAST_ROWS, LEAST_TOKENS = 4, 32
"""Rows and supervised tokens without which no merge counts as verified."""


@dataclass(frozen=True)
class MergedRun:
    """Hold the written model and its comparison with the live adapter model.

    Attributes:
        report: what the merge wrote.
        verification: the comparison.
        proofs: the verdict in each program that serves the model.
        precisions: the choice of the base, and the task loss in 16 bits and in NF4.
    """

    report: MergeReport
    verification: Verification
    proofs: list[EngineProof]
    precisions: Precisions

    @property
    def folder(self) -> Path:
        return self.report.folder

    @property
    def findings(self) -> list[Finding]:
        return list(self.report.findings)

    @property
    def passed(self) -> bool:
        """Return False if the artefact is not the trained model."""
        failed = any(proof.status == "failed" for proof in self.proofs)
        return self.verification.passed and not failed and not has_errors(self.findings)

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready mapping."""
        return {
            "passed": self.passed,
            "merge": self.report.to_dict(),
            "verification": self.verification.to_dict(),
            **self.precisions.to_dict(),
        }


def merge(
    run: str | Path,
    *,
    onto: MergeBase | None = None,
    base: str | None = None,
    out: str | Path | None = None,
    export_format: str = DEFAULT_FORMAT,
    dtype: str = "auto",
    checkpoint: str = LAST,
    asks_vllm: bool = False,
) -> MergedRun:
    """Merge the trained weights of `run` into its base, and verify the artefact from disk.

    `onto` "quantized" adds the delta to the dequantized 4-bit base, the model that was trained; "original" adds it to
    the checkpoint as stored, or to the 16-bit model `base`. None measures both where the original is at hand, and takes
    the original if its task loss is as good. `dtype` is bf16, fp16, fp32, or auto, which keeps each tensor's own onto
    "original" and is bf16 onto "quantized". `checkpoint` is last, best (by held-out loss) or a step. `asks_vllm` opens
    the artefact in vLLM too, where it is installed. The artefact gets its name once it is measured, even if it fails
    (`passed` False). A killed merge leaves at most a hidden folder: nothing unverified looks finished.

    Raises UsageError, RunDirError, CheckpointError, BackboneError, AdapterError, TemplateError or VerificationError.
    """
    _require_known(onto)
    form, folder = format_named(export_format), RunDir.open(Path(run))
    finished = FinishedRun.open(folder.path, checkpoint)
    place = base_folder(finished.config.base, finished.config.revision)
    if isinstance(form, Gguf):  # before minutes of measuring
        form.require_base(place)
    with redirect_library_logs(folder.log, optional=True):
        rows = verification_rows(folder, template_of(folder))
        if isinstance(form, Gguf):
            form.require_rows(place, rows)
        finishing = Finishing(finished, verification_records(folder), rows, asks_vllm)
        proof = MergeProof(finished, rows, finishing, onto, base)
        report = _first_as_good(
            proof,
            form,
            out=_named(folder, out, onto, form, finished),
            fingerprint=folder.base_fingerprint(),
            base=base,
            dtype=dtype,
            checkpoint=checkpoint,
        )
        assert proof.verification is not None and proof.precisions is not None
        return MergedRun(report, proof.verification, proof.proofs, proof.precisions)


def _first_as_good(proof: MergeProof, form: ExportFormat, **given: Any) -> MergeReport:
    """Merge in each way in turn, onto other bases and with an importance matrix, until one is not refused."""
    ways = [(onto, form) for onto in proof.candidates(form)]
    if isinstance(form, Gguf) and form.lossy:
        onto = ways[-1][0]
        ways.insert(0, (onto, proof.weighed(form, partial(write_merged, proof.run.folder, onto=onto, **given))))
    for onto, one in ways[:-1]:
        with suppress(NotAsGood):
            return write_merged(proof.run.folder, onto=onto, export_format=one, prove=proof.prove, **given)
    onto, one = ways[-1]
    return write_merged(proof.run.folder, onto=onto, export_format=one, prove=proof.prove, **given)


def _named(
    run: RunDir, out: str | Path | None, onto: MergeBase | None, form: ExportFormat, finished: FinishedRun
) -> Path | None:
    """Return the folder of the merge; None for the name by base and format."""
    if out is not None:
        return Path(out)
    is_open = onto is None and form.name == DEFAULT_FORMAT and finished.config.method != "full"
    return run.exports / f"merged{finished.weights.suffix}" if is_open else None


def _require_known(onto: str | None) -> None:
    """Raise UsageError unless `onto` is a base to merge onto."""
    if onto is not None and onto not in MERGE_BASES:
        names = " or ".join(MERGE_BASES)
        raise UsageError(f"'{onto!s:.40}' is no base to merge onto", where="onto", fix=f"write {names}")


def template_of(run: RunDir) -> Template:
    """Return the template of the run, with its golden prompts asserted."""
    config = run.config()
    return Template.load(run.template, TextTokenizer.from_base(config.base, config.revision))


def verification_rows(run: RunDir, template: Template, limit: int = VERIFIED_ROWS) -> list[Row]:
    """Return the first held-out rows that the run kept, tokenized as in training."""
    encoded = template.encode_many(verification_records(run, limit))
    rows = [Row(np.array(one.ids, np.int32), np.array(one.mask, bool)) for one in encoded]
    _require_enough(rows, run)
    return rows


def verification_records(run: RunDir, limit: int | None = VERIFIED_ROWS) -> list[Record]:
    """Return the first `limit` held-out rows that the run kept, or all of them."""
    if not run.samples.is_file():
        raise VerificationError("the run kept no rows to verify on", where=str(run.samples), fix="train it again")
    lines = run.samples.read_text(encoding="utf-8", errors="replace").splitlines()[:limit]
    try:
        samples = [json.loads(line) for line in lines]
        return [_record(one) for one in samples]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        fix = "run the train command again, which rewrites the file"
        raise VerificationError("the file is damaged", where=str(run.samples), fix=fix) from error


def _require_enough(rows: list[Row], run: RunDir) -> None:
    """Raise VerificationError if the rows are too few to tell a right merge from a wrong one."""
    tokens = [len(row.predicting) for row in rows if len(row.predicting)]
    if len(tokens) < LEAST_ROWS or sum(tokens) < LEAST_TOKENS:
        raise VerificationError(
            f"too few rows for a proof: {len(tokens)} with {sum(tokens)} tokens, and {LEAST_ROWS} with "
            f"{LEAST_TOKENS} are needed",
            where=str(run.samples),
            fix="train on more rows, or serve base and adapter",
        )


def _record(sample: dict[str, Any]) -> Record:
    """Return the record of one line that the run kept, with the turns that were not taught."""
    kwargs = sample.get("template_kwargs")
    record = Record.from_messages(sample["messages"], sample["source"], sample.get("tools", ()), kwargs)
    if not (flags := sample.get("loss")):
        return record
    return replace(
        record, turns=tuple(replace(turn, loss=flag) for turn, flag in zip(record.turns, flags, strict=True))
    )
