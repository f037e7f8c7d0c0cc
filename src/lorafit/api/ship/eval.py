"""eval: measure a run or a merged model on rows, beside its base or another model."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorafit.api.load import load
from lorafit.api.merge import verification_records
from lorafit.data import Prepared, Template, prepare, require_clean
from lorafit.data.summary import Progress
from lorafit.engine import release_memory
from lorafit.errors import RunDirError, UsageError
from lorafit.evaluate import (
    KNOWN,
    LOSS,
    Evaluation,
    Metric,
    ModelScores,
    Question,
    longest_answer,
    questions_of,
    replies,
)
from lorafit.runs import LAST, RunDir, staged_folder, write_text
from lorafit.serve import Session

ROWS = 200
ANSWERS_FILE, EVALUATION_FILE = "answers.jsonl", "evaluation.json"
TUNED, BASE = "tuned", "base"


@dataclass(frozen=True)
class EvaluatedRun:
    """Hold an evaluation and where it was written.

    Attributes:
        evaluation: the metrics.
        notes: sentences on what limits them.
        below: metric -> (its value, the least that was asked for), for each that misses it.
        folder: the folder with evaluation.json and answers.jsonl; None if none was asked for.
    """

    evaluation: Evaluation
    notes: tuple[str, ...]
    below: Mapping[str, tuple[float, float]]
    folder: Path | None

    @property
    def passed(self) -> bool:
        """Return False if a metric is below its least value."""
        return not self.below

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready mapping."""
        below = {name: {"value": value, "least": least} for name, (value, least) in self.below.items()}
        folder = str(self.folder) if self.folder else None
        return {
            "passed": self.passed,
            **self.evaluation.to_dict(),
            "below": below,
            "notes": list(self.notes),
            "folder": folder,
        }


def eval(
    model: str | Path,
    data: Sequence[str | Path] | str | Path | None = None,
    *,
    against: str | Path | None = None,
    limit: int = ROWS,
    max_new_tokens: int | None = None,
    field_map: Mapping[str, str] | None = None,
    least: Mapping[str, float] | None = None,
    metrics: Mapping[str, Metric] | None = None,
    out: str | Path | None = None,
    checkpoint: str = LAST,
    on_progress: Callable[[Progress], None] | None = None,
    on_answer: Callable[[str, int, int], None] | None = None,
) -> EvaluatedRun:
    """Measure `model`, a run directory or a merged model, beside its base or beside `against`.

    Rows are the held-out rows that the run kept, or those of `data`, read and tokenized as in training; `limit` takes
    the first of them. Answers are greedy. The metrics are the loss, exact match and token F1; for responses that are
    all JSON also whether an answer is JSON, equals the response, and the share of right fields. `metrics` adds
    functions (expected, answer) -> score. `least` names the least value of a metric; the loss is held below its value.
    `checkpoint` chooses the run's weights. `out` is a new folder for evaluation.json and answers.jsonl. `on_answer`
    receives the model's name, the rows that it has answered, and all rows.

    Raises UsageError, DataError, RunDirError, BackboneError, AdapterError, TemplateError or VerificationError.
    """
    folder = _new_folder(out)
    _require_metrics(least or {}, [*KNOWN, *(metrics or {})])
    session = load(model, checkpoint=checkpoint)
    questions, rows_from, notes = _questions(session, data, limit, field_map, on_progress)
    most = max_new_tokens or longest_answer(questions)
    asking = _Asking(most, metrics or {}, on_answer)
    tuned = asking.scored(session, TUNED, questions)
    other = asking.scored(session, BASE, questions, tuned=False) if not (against or session.is_merged) else None
    if against:
        del session
        other = asking.scored_against(against, questions)
    evaluation = Evaluation.of(rows_from, tuned, other, most)
    below = _below(evaluation, least or {})
    evaluated = EvaluatedRun(evaluation, tuple(notes + _cut_note(evaluation)), below, folder)
    if folder:
        _write(folder, evaluated)
    return evaluated


def _questions(
    session: Session,
    data: Sequence[str | Path] | str | Path | None,
    limit: int,
    field_map: Mapping[str, str] | None,
    on_progress: Callable[[Progress], None] | None,
) -> tuple[list[Question], str, list[str]]:
    """Return the rows to answer, where they come from, and notes on them."""
    names = [str(data)] if isinstance(data, str | Path) else [str(each) for each in data or ()]
    if not names:
        if session.is_merged:
            where = str(session.run.path)
            raise UsageError("a merged model keeps no rows", where=where, fix="name a file of rows after it")
        return _kept_rows(session.run, session.template, limit)
    every = _prepared(session, names, field_map, on_progress).train
    rows = questions_of(every.select(range(min(limit, len(every)))), session.template)
    notes = [f"the first {limit:,} of {len(every):,} rows; --limit takes more"] if limit < len(every) else []
    trained = {str(Path(name).resolve()) for name in session.config.data}
    seen = [name for name in names if str(Path(name).resolve()) in trained]
    notes += [f"the run was trained on {name}: these rows tell nothing about new ones" for name in seen]
    return _non_empty(rows, ", ".join(names)), ", ".join(names), notes


def _kept_rows(run: RunDir, template: Template, limit: int) -> tuple[list[Question], str, list[str]]:
    """Return the held-out rows that the run kept; training rows that it kept beside them stay out."""
    records = verification_records(run, None)
    trained = _trained_sources(run)
    held_out = [record for record in records if record.source not in trained]
    if not held_out:
        raise UsageError("the run held no rows out", where=str(run.path), fix="name a file of rows after it")
    chosen = held_out[:limit]
    encoded = template.encode_many(chosen)
    rows = [Question.of(record, one.ids, one.mask, template) for record, one in zip(chosen, encoded, strict=True)]
    return _non_empty(rows, str(run.samples)), "held-out rows of the run", []


def _trained_sources(run: RunDir) -> set[str]:
    """Return `file:line` of the training rows, as split.tsv names them."""
    try:
        lines = run.split.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return set()
    except OSError as error:
        reason = error.strerror or str(error)
        raise RunDirError(f"cannot be read ({reason})", where=str(run.split), fix="check its permissions") from error
    return {source for side, _, source in (line.partition("\t") for line in lines) if side == "train"}


def _prepared(
    session: Session,
    names: Sequence[str],
    field_map: Mapping[str, str] | None,
    on_progress: Callable[[Progress], None] | None,
) -> Prepared:
    missing = [name for name in names if RunDir(Path(name)).settings.is_file()]
    if missing:
        raise UsageError("this is a run directory, not rows", where=missing[0], fix="compare runs with --against")
    changes: dict[str, Any] = {"data": tuple(names), "holdout": 0.0}
    if field_map:
        changes["field_map"] = dict(field_map)
    config = session.config.model_copy(update=changes)
    prepared = prepare(config, session.template, on_progress=on_progress)
    require_clean(prepared)
    return prepared


@dataclass(frozen=True)
class _Asking:
    most: int
    metrics: Mapping[str, Metric]
    on_answer: Callable[[str, int, int], None] | None

    def scored(self, session: Session, name: str, questions: Sequence[Question], *, tuned: bool = True) -> ModelScores:
        """Return the scores of one model; `tuned=False` asks the run's base."""

        def answered(done: int) -> None:
            if self.on_answer:
                self.on_answer(name, done, len(questions))

        answered(0)
        with session.answering(tuned=tuned) as model:
            found = replies(
                model,
                questions,
                session.template,
                session.stop_ids,
                max_new_tokens=self.most,
                on_answer=answered,
            )
        return ModelScores.of(name, questions, found, self.metrics)

    def scored_against(self, path: str | Path, questions: Sequence[Question]) -> ModelScores:
        """Return the scores of the run or merged model in `path`, once the memory of the first is free."""
        release_memory()
        session = load(path)
        return self.scored(session, _name_of(path), _asked_of(session, questions))


def _asked_of(session: Session, questions: Sequence[Question]) -> list[Question]:
    """Return the same rows, tokenized by another model's template. Raises UsageError if it cannot encode one."""
    records = [question.record for question in questions]
    encoded = session.template.encode_many(records)
    asked = [
        Question.of(record, one.ids, one.mask, session.template) for record, one in zip(records, encoded, strict=True)
    ]
    bare = [question.record.source for question in asked if not question.supervised]
    if bare:
        where, fix = str(session.run.path), "compare with a model that has a template for them"
        raise UsageError(f"its chat template cannot render {bare[0]}", where=where, fix=fix)
    return asked


def _non_empty(rows: list[Question], where: str) -> list[Question]:
    useful = [row for row in rows if row.supervised]
    if not useful:
        raise UsageError("no row has a response to compare with", where=where, fix="name rows with responses")
    return useful


def _require_metrics(least: Mapping[str, float], names: Sequence[str]) -> None:
    """Raise UsageError if `least` names a metric that is not among `names`."""
    unknown = [name for name in least if name not in names]
    if unknown:
        raise UsageError(f"there is no metric '{unknown[0]}' on these rows", fix=f"name one of {', '.join(names)}")


def _below(evaluation: Evaluation, least: Mapping[str, float]) -> dict[str, tuple[float, float]]:
    """Return (value, bound) of each metric that misses its bound."""
    found = evaluation.tuned.metrics
    _require_metrics(least, list(found))
    means = {name: (found[name].mean, bound) for name, bound in least.items()}
    return {
        name: (mean, bound)
        for name, (mean, bound) in means.items()
        if not (mean <= bound if name == LOSS else mean >= bound)
    }


def _cut_note(evaluation: Evaluation) -> list[str]:
    if not evaluation.cut:
        return []
    most = evaluation.max_new_tokens
    return [f"{evaluation.cut} answers were cut at {most} tokens; --max-new-tokens allows longer ones"]


def _new_folder(out: str | Path | None) -> Path | None:
    """Return the folder to write to. Raises UsageError if something is there already."""
    if out is None:
        return None
    folder = Path(out)
    if folder.exists() or folder.is_symlink():
        raise UsageError("something is there already", where=str(folder), fix="name a new folder with --out")
    return folder


def _write(folder: Path, evaluated: EvaluatedRun) -> None:
    lines = [json.dumps(row, ensure_ascii=False) for row in evaluated.evaluation.rows_to_dicts()]
    with staged_folder(folder) as staged:  # whole, or not at all
        write_text(staged / ANSWERS_FILE, "".join(f"{line}\n" for line in lines))
        write_text(staged / EVALUATION_FILE, json.dumps(evaluated.to_dict(), indent=2, ensure_ascii=False) + "\n")


def _name_of(path: str | Path) -> str:
    name = Path(path).resolve().name
    return f"{name} (other)" if name == TUNED else name
