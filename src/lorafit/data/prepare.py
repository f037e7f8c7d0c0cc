"""prepare: the rows that a run trains on, from the files that a user names."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from lorafit.config import EMBEDDING, RunConfig, base_folder, parse_bytes
from lorafit.data.cache import bulk_is_whole, confirm, default_folder, key_of, stored
from lorafit.data.checks.findings import CODES, FindingCounts
from lorafit.data.checks.initial_prompts import initial_prompt_findings
from lorafit.data.checks.untrained_tokens import missing_embeddings, untrained_special_tokens
from lorafit.data.checks.whole_set import WholeSet, group_of, held_out, write_split
from lorafit.data.gather import Gatherer
from lorafit.data.pack import packed_fill, steps_per_epoch
from lorafit.data.schema.parts import IMAGE_FIX
from lorafit.data.sources.discovery import find_files
from lorafit.data.sources.files import DataFile
from lorafit.data.sources.reader import RowReader
from lorafit.data.store import Rows, Stored, StoreWriter
from lorafit.data.summary import Clock, Histogram, Listener, Summary
from lorafit.errors import DataError, RunDirError
from lorafit.findings import Finding, Severity, chosen
from lorafit.runs import new_own

if TYPE_CHECKING:
    from lorafit.data.template.template import Template

FILL_STEPS = 1000
PLACEHOLDER_SHARE = 0.01


@dataclass(frozen=True)
class Prepared:
    """Hold the rows that were read and judged.

    Attributes:
        train: the rows to train on.
        holdout: the held-out rows.
        findings: all findings about the rows.
        summary: the numbers.
        rejected: the file of rejected and dropped rows; None if there are none, or without a run directory.
    """

    train: Rows
    holdout: Rows
    findings: list[Finding]
    summary: Summary
    rejected: Path | None

    @property
    def is_mended_by_drop(self) -> bool:
        """True if there are errors, and `on_bad=drop` would leave rows to train on and no error."""
        errors = [finding.code for finding in self.findings if finding.severity is Severity.ERROR]
        drops = all(CODES[code].rejects and code != "D020" for code in errors)
        return bool(errors) and drops and len(self.train) > 0

    @property
    def longest(self) -> int:
        """Tokens of the longest row, held-out rows counted."""
        return max((int(rows.lengths.max()) for rows in (self.train, self.holdout) if len(rows)), default=0)


def prepare(
    config: RunConfig,
    template: Template | None,
    *,
    run_dir: Path | None = None,
    cache_dir: Path | None = None,
    on_progress: Listener | None = None,
    reads_rows: bool = True,
) -> Prepared:
    """Read, judge, tokenise and split `config.data`. Without a template it does all that needs no tokenizer.

    Rows that cannot be trained on become findings of severity error (`require_clean` raises for those), never
    exceptions. Raises DataError when a file is missing, empty, unreadable or holds no rows of a known shape.
    With `run_dir` the split and the rejected rows are written there. Callers that want findings and numbers alone pass
    `reads_rows` as False: the bytes of rows from the cache are then checked when the first of them is read.
    """
    started = time.monotonic()
    files, left_out = _files_to_read(config)
    key, folder = key_of(config, template, files), cache_dir or default_folder()

    def build(into: Path) -> None:
        _gather(config, template, files, into, on_progress)

    def judged(rows: Stored, cached: bool) -> Prepared:
        whole = WholeSet(rows, _held(config, files, rows), config.holdout, any(file.held_out for file in files))
        train, holdout = (whole.rows.select(np.flatnonzero(side)) for side in (~whole.held, whole.held))
        findings = [*_row_findings(config, rows), *whole.findings(), *_base_findings(config, template, rows)]
        findings += _left_out_findings(left_out, files)
        findings = chosen(sorted(findings, key=lambda one: one.code), config.select, config.ignore)
        summary = _summary(config, template, whole, train, holdout, time.monotonic() - started, cached)
        return Prepared(train, holdout, findings, summary, None)

    with ThreadPoolExecutor(max_workers=1) as beside:
        rows, cached = stored(key, folder, build, but_bulk=True)
        sound = beside.submit(bulk_is_whole, rows) if cached and reads_rows else None  # judging reads none of it
        prepared = judged(rows, cached)
    if sound and not sound.result():
        rows, cached = stored(key, folder, build)
        prepared = judged(rows, cached)
    if cached and not reads_rows:
        rows.rows.pending.append(lambda: confirm(rows))
    return replace(prepared, rejected=_recorded(rows, run_dir, prepared.train, prepared.holdout))


def _files_to_read(config: RunConfig) -> tuple[list[DataFile], list[DataFile]]:
    """Return (files to read, files left out). Of a folder, test files are left out and validation files held out.

    Raises DataError when nothing of the named data is left to train on.
    """
    found = find_files(config.data, encoding=config.encoding)
    held: list[DataFile] = []
    if isinstance(config.holdout, str):
        held = find_files((config.holdout,), held_out=True, encoding=config.encoding)
    named = {file.hub_id or file.path.resolve() for file in held}
    # one file on both sides is D032's to tell
    found = [file for file in found if (file.hub_id or file.path.resolve()) not in named] or found
    train = [file for file in found if file.split in ("", "train")]
    if not train:
        where, names = config.data[0], ", ".join(file.name for file in found[:4]) or config.data[0]
        what = f"nothing is left to train on: by their names all files are for validation or tests ({names})"
        raise DataError(what, where=where, fix="name the files to train on themselves")
    validation = [] if named or not config.holdout else [file for file in found if file.split == "validation"]
    held += [replace(file, held_out=True) for file in validation]
    return train + held, [file for file in found if file.split and file not in train and file not in validation]


def _left_out_findings(left_out: Sequence[DataFile], files: Sequence[DataFile]) -> list[Finding]:
    """Return findings on the files of a folder that are left out or held out by their names."""
    held = [file.name for file in files if file.held_out and file.split]
    if not left_out and not held:
        return []
    names = [file.name for file in left_out]
    parts = [f"held out: {', '.join(held[:4])}"] if held else []
    parts += [f"not read: {', '.join(names[:4])}"] if names else []
    rule = CODES["D052"]
    message = f"splits by the names of files: {'; '.join(parts)}"
    return [Finding("D052", Severity.INFO, message, (names or held)[0], rule.why, rule.fix, len(names) + len(held))]


def _gather(
    config: RunConfig, template: Template | None, files: Sequence[DataFile], folder: Path, listener: Listener | None
) -> None:
    reader = RowReader(files, parse_bytes(config.max_unpacked))
    Gatherer(config, template, reader, StoreWriter(folder), Clock(listener, reader.bytes_total)).run()


def _held(config: RunConfig, files: Sequence[DataFile], rows: Stored) -> NDArray[np.bool_]:
    if any(file.held_out for file in files):
        return np.array([file.held_out for file in files], np.bool_)[rows.rows.file]
    assert not isinstance(config.holdout, str), "a file that is named is held out"
    return held_out(group_of(rows), rows.exact, config.holdout, config.seed)


LEAVE_OUT = IMAGE_FIX.removeprefix("take it out")
"""The half of a fix that would leave no row, where every row has the fault."""


def _row_findings(config: RunConfig, rows: Stored) -> list[Finding]:
    strict = {code for code, rule in CODES.items() if rule.rejects and config.on_bad == "stop"} - {"D020"}
    if config.on_long == "error":
        strict.add("D020")
    counts, kept = FindingCounts.from_dict(rows.facts["finding_counts"]), rows.facts["counts"]["kept"]
    if "D046" in counts.seen and counts.seen["D046"].count <= PLACEHOLDER_SHARE * kept:
        del counts.seen["D046"]
    if "D025" in counts.seen:
        answers, tokens = rows.facts["lost"]
        total = counts.seen["D025"]
        total.detail, total.is_total = f"{answers:,} answers of {tokens:,} tokens are not learnt", True
    if not kept:
        for seen in counts.seen.values():
            seen.fix = seen.fix.removesuffix(LEAVE_OUT)
    return counts.findings(strict)


def _base_findings(config: RunConfig, template: Template | None, rows: Stored) -> list[Finding]:
    """Return findings on tokens without an embedding, or with an untrained one, and on the initial adapter.

    It needs the base's weights on disk.
    """
    if template is None or not config.base:
        return []
    return [*initial_prompt_findings(config, template), *_token_findings(config, template, rows)]


def _token_findings(config: RunConfig, template: Template, rows: Stored) -> list[Finding]:
    folder = base_folder(config.base, config.revision)
    missing = missing_embeddings(folder, rows, template.tokenizer)
    if missing:
        return missing
    found = untrained_special_tokens(template.tokenizer, folder, template)
    trains_all = config.method == "full" or EMBEDDING in config.modules_to_save
    tokens = [] if trains_all else [token for token in found if token not in config.trainable_tokens]
    if not tokens:
        return []
    rule = CODES["D050"]
    message = f"{rule.title}: {', '.join(tokens[:8])}{', …' if len(tokens) > 8 else ''}"
    return [Finding("D050", Severity.WARNING, message, str(folder), rule.why, rule.fix, len(tokens))]


def _summary(
    config: RunConfig,
    template: Template | None,
    whole: WholeSet,
    train: Rows,
    holdout: Rows,
    seconds: float,
    cached: bool,
) -> Summary:
    facts, lengths = whole.stored.facts, whole.rows.lengths
    # packing a thousand steps tells how full all of them will be
    sample = train.lengths[:: 1 + len(train) // (FILL_STEPS * config.examples_per_step)]
    fill = packed_fill(sample, config.examples_per_step, config.max_length, config.seed)
    return Summary(
        files=tuple(facts["names"]),
        shape=facts["shape"],
        **facts["counts"],
        duplicates=int(whole.exact_copies.sum()),
        near_duplicates=int(whole.near_copies.sum()),
        train_rows=len(train),
        holdout_rows=len(holdout),
        tokenised=template is not None,
        tokens=int(lengths.sum(dtype=np.int64)),
        supervised_tokens=int(whole.rows.supervised.sum(dtype=np.int64)),
        longest=int(lengths.max(initial=0)),
        histogram=Histogram.of(lengths) if template else Histogram(),
        packed_fill=fill.share,
        steps_per_epoch=steps_per_epoch(len(train), config.examples_per_step),
        seconds=seconds,
        near_duplicate_seconds=facts["copies_s"],
        cached=cached,
    )


def _recorded(rows: Stored, run_dir: Path | None, train: Rows, holdout: Rows) -> Path | None:
    """Write the split and the rejected rows to the run directory. Return the path of the latter, if any."""
    if run_dir is None:
        return None
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        write_split(run_dir / "split.tsv", train, holdout)
        source, place = rows.folder / "rejected.jsonl", run_dir / "rejected.jsonl"
        if source.stat().st_size:
            with os.fdopen(new_own(place), "wb") as copy, source.open("rb") as rejected:
                shutil.copyfileobj(rejected, copy)
            return place
        place.unlink(missing_ok=True)  # of an attempt before the rows were mended
        return None
    except OSError as error:
        reason = error.strerror or str(error)
        raise RunDirError(f"cannot be written ({reason})", where=str(run_dir), fix="check the folder") from error


def require_clean(prepared: Prepared) -> None:
    """Raise DataError if a finding is an error, with the count, the first one, and the place of the rest."""
    errors = [finding for finding in prepared.findings if finding.severity is Severity.ERROR]
    if not errors:
        return
    first, more = errors[0], len(errors) - 1
    also = f", and {more} more kind{'s' if more > 1 else ''} of error" if more else ""
    rest = f"all of them are in {prepared.rejected}" if prepared.rejected else "'lorafit check' lists them all"
    drop = ", or pass --on-bad drop" if prepared.is_mended_by_drop else ""
    raise DataError(f"{first.message} [{first.code}]{also}", where=first.where, fix=f"{first.fix}{drop}; {rest}")
