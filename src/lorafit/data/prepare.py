"""prepare: everything between the files a user names and the rows a run trains on."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from lorafit.config import RunConfig, base_folder, parse_bytes
from lorafit.data.cache import default_folder, key_of, stored
from lorafit.data.checks.findings import CODES, FindingCounts
from lorafit.data.checks.untrained_tokens import untrained_special_tokens
from lorafit.data.checks.whole_set import WholeSet, group_of, held_out, write_split
from lorafit.data.gather import Gatherer
from lorafit.data.pack import packed_fill, steps_per_epoch
from lorafit.data.sources.files import DataFile, find_files
from lorafit.data.sources.reader import RowReader
from lorafit.data.store import Rows, Stored, StoreWriter
from lorafit.data.summary import Clock, Histogram, Listener, Summary
from lorafit.errors import DataError, RunDirError
from lorafit.findings import Finding, Severity, chosen

if TYPE_CHECKING:
    from lorafit.data.template.template import Template

FILL_STEPS = 1000


@dataclass(frozen=True)
class Prepared:
    """Rows to train on and held-out rows, what was found, the numbers, and the file of rejected rows if any."""

    train: Rows
    holdout: Rows
    findings: list[Finding]
    summary: Summary
    rejected: Path | None


def prepare(
    config: RunConfig,
    template: Template | None,
    *,
    run_dir: Path | None = None,
    cache_dir: Path | None = None,
    on_progress: Listener | None = None,
) -> Prepared:
    """Read, judge, tokenise and split `config.data`; without a template all that needs no tokenizer.

    Rows that cannot be trained on become findings of severity error (`require_clean` raises for those), never
    exceptions. Raises DataError when a file is missing, empty, unreadable or holds no rows of a known shape.
    With `run_dir` the split and the rejected rows are written there.
    """
    started = time.monotonic()
    files = find_files(config.data)
    if isinstance(config.holdout, str):
        files += find_files((config.holdout,), held_out=True)
    key = key_of(config, template, files)
    rows, cached = stored(
        key, cache_dir or default_folder(), lambda folder: _gather(config, template, files, folder, on_progress)
    )
    held = _held(config, files, rows)
    whole = WholeSet(rows, held, config.holdout)
    train, holdout = whole.rows.select(np.flatnonzero(~held)), whole.rows.select(np.flatnonzero(held))
    findings = [*_row_findings(config, rows), *whole.findings(), *_base_findings(config, template)]
    findings = chosen(sorted(findings, key=lambda one: one.code), config.select, config.ignore)
    summary = _summary(config, template, whole, train, holdout, time.monotonic() - started, cached)
    return Prepared(train, holdout, findings, summary, _recorded(rows, run_dir, train, holdout))


def _gather(
    config: RunConfig, template: Template | None, files: Sequence[DataFile], folder: Path, listener: Listener | None
) -> None:
    reader = RowReader(files, parse_bytes(config.max_unpacked))
    Gatherer(config, template, reader, StoreWriter(folder), Clock(listener, reader.bytes_total)).run()


def _held(config: RunConfig, files: Sequence[DataFile], rows: Stored) -> NDArray[np.bool_]:
    if isinstance(config.holdout, str):
        return np.array([file.held_out for file in files], np.bool_)[rows.rows.file]
    return held_out(group_of(rows), rows.exact, config.holdout, config.seed)


def _row_findings(config: RunConfig, rows: Stored) -> list[Finding]:
    strict = {code for code, rule in CODES.items() if rule.rejects and config.on_bad == "stop"} - {"D020"}
    if config.on_long == "error":
        strict.add("D020")
    return FindingCounts.from_dict(rows.facts["finding_counts"]).findings(strict)


def _base_findings(config: RunConfig, template: Template | None) -> list[Finding]:
    """Special tokens of the template that the base never learnt; needs the base's weights on disk."""
    if template is None or not config.base:
        return []
    folder = base_folder(config.base, config.revision)
    tokens = untrained_special_tokens(template.tokenizer, folder, template)
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
    """Put the split and the rejected rows into the run directory; the path of the latter, if there are any."""
    if run_dir is None:
        return None
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        write_split(run_dir / "split.tsv", train, holdout)
        source, place = rows.folder / "rejected.jsonl", run_dir / "rejected.jsonl"
        if source.stat().st_size:
            return Path(shutil.copyfile(source, place))
        place.unlink(missing_ok=True)  # of an attempt before the rows were mended
        return None
    except OSError as error:
        reason = error.strerror or str(error)
        raise RunDirError(f"cannot be written ({reason})", where=str(run_dir), fix="check the folder") from error


def require_clean(prepared: Prepared) -> None:
    """Raises DataError in one sentence when a finding is an error: how many, the first, and where the rest is."""
    errors = [finding for finding in prepared.findings if finding.severity is Severity.ERROR]
    if not errors:
        return
    first, more = errors[0], len(errors) - 1
    also = f", and {more} more kind{'s' if more > 1 else ''} of error" if more else ""
    rest = f"all of them are in {prepared.rejected}" if prepared.rejected else "'lorafit check' lists them all"
    drop = ", or pass --on-bad drop" if any(CODES[one.code].rejects and one.code != "D020" for one in errors) else ""
    raise DataError(f"{first.message} [{first.code}]{also}", where=first.where, fix=f"{first.fix}{drop}; {rest}")
