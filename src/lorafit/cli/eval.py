"""eval: the command `lorafit eval`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from lorafit.cli import flags
from lorafit.cli.screen.console import PEOPLE, counted, heading, near, say, show_json, show_next, typed
from lorafit.errors import UsageError
from lorafit.imports import importing_torch

if TYPE_CHECKING:
    from lorafit.api.ship.eval import EvaluatedRun
    from lorafit.evaluate import Difference, Estimate, Evaluation, ScoredRow

EXAMPLES = """Examples:

lorafit eval runs/orders

lorafit eval runs/orders test.jsonl --limit 500 --out evaluations/orders

lorafit eval runs/orders --least exact_match=0.9

lorafit eval runs/orders-2 test.jsonl --against runs/orders"""
SHOWN_ROWS = 3
NAMES = {"exact_match": "exact match", "token_f1": "token F1", "json_valid": "valid JSON", "json_equal": "equal JSON"}
NAMES |= {"json_fields": "right JSON fields", "loss": "loss"}
COLOURS = {"better": "green", "worse": "red", "no difference shown": "dim"}


Model = Annotated[str, typer.Argument(help="Run directory, or a merged model.", show_default=False)]
Rows = Annotated[
    list[str] | None, typer.Argument(help="Files of rows; default the run's held-out rows.", show_default=False)
]
Against = Annotated[
    str | None,
    typer.Option(
        "--against", metavar="MODEL", help="Compare with this run or merged model, not the base.", show_default=False
    ),
]
Limit = Annotated[int, typer.Option("--limit", metavar="NUMBER", min=1, help="Most rows.")]
MaxNewTokens = Annotated[
    int | None,
    typer.Option(
        "--max-new-tokens",
        metavar="NUMBER",
        min=1,
        help="Most tokens of an answer; default by the responses.",
        show_default=False,
    ),
]
Least = Annotated[
    list[str] | None,
    typer.Option(
        "--least", metavar="METRIC=VALUE", help="Exit with 1 if the metric is worse; repeatable.", show_default=False
    ),
]
Out = Annotated[
    str | None,
    typer.Option("--out", metavar="FOLDER", help="New folder for metrics and every answer.", show_default=False),
]


def eval(
    model: Model,
    data: Rows = None,
    against: Against = None,
    limit: Limit = 200,
    max_new_tokens: MaxNewTokens = None,
    map: flags.Map = None,
    least: Least = None,
    out: Out = None,
    checkpoint: flags.Checkpoint = "last",
    json: flags.Json = False,
) -> None:
    """Measure a run on its held-out rows or yours, beside its base, with confidence intervals."""
    with importing_torch():
        from lorafit.api.ship.eval import eval as run_eval
    from lorafit.cli.screen.data_view import ReadingBar
    from lorafit.config import parse_assignments

    fields = {key: str(value) for key, value in parse_assignments(map or [], "--map").items()}
    with ReadingBar() as bar:
        evaluated = run_eval(
            model,
            data,
            against=against,
            limit=limit,
            max_new_tokens=max_new_tokens,
            field_map=fields,
            least=_numbers(least or []),
            out=out,
            checkpoint=checkpoint,
            on_progress=bar.show,
            on_answer=lambda name, done, total: bar.show_step(f"{name} answers", done, total),
        )
    if json:
        show_json(evaluated.to_dict())
    else:
        show_evaluated(evaluated)
        _show_next(model, data or [], evaluated)
    raise typer.Exit(0 if evaluated.passed else 1)


def _numbers(assignments: list[str]) -> dict[str, float]:
    found = {}
    for assignment in assignments:
        name, _, value = assignment.partition("=")
        try:
            found[name.strip().replace(" ", "_")] = float(value)
        except ValueError as error:
            fix = "write it as exact_match=0.9"
            raise UsageError(f"'{assignment}' is no metric with a number", where="--least", fix=fix) from error
    return found


def show_evaluated(evaluated: EvaluatedRun) -> None:
    """Show each metric of both models, the difference, and rows that are answered wrong."""
    evaluation = evaluated.evaluation
    rows = counted(len(evaluation.tuned.rows), "row")
    heading("eval", f"{rows}, {evaluation.tokens:,} supervised tokens: {escape(evaluation.rows_from)}")
    PEOPLE.print(Padding(_table(evaluation), (0, 0, 0, 2)))
    _show_wrong(evaluation)
    for note in evaluated.notes:
        say(f"  [yellow]note[/yellow] {escape(note)}")
    for name, (value, bound) in evaluated.below.items():
        say(f"  [red]missed[/red] {name} is {value:.4g}, and {bound:g} was asked for")
    if evaluated.folder:
        say(f"  {escape(near(str(evaluated.folder)))}")


def _table(evaluation: Evaluation) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    other = evaluation.other
    columns = ["metric", *([escape(other.name)] if other else []), evaluation.tuned.name]
    for place, title in enumerate([*columns, *(["difference (95 %)", ""] if other else ["95 %"])]):
        table.add_column(title, justify="left" if place == 0 or not title else "right", no_wrap=True)
    for name, estimate in evaluation.tuned.metrics.items():
        cells = [NAMES.get(name, escape(name))]
        if other:
            theirs = _value(name, other.metrics[name].mean) if name in other.metrics else ""
            cells += [theirs, f"[bold]{_value(name, estimate.mean)}[/bold]"]
            cells += _difference(name, evaluation.differences.get(name))
        else:
            cells += [f"[bold]{_value(name, estimate.mean)}[/bold]", _interval(name, estimate)]
        table.add_row(*cells)
    return table


def _value(name: str, value: float) -> str:
    return f"{value:.1%}" if name in NAMES and name != "loss" else f"{value:.4f}"


def _interval(name: str, estimate: Estimate) -> str:
    return f"{_value(name, estimate.low)} to {_value(name, estimate.high)}"


def _difference(name: str, difference: Difference | None) -> list[str]:
    if difference is None or math.isnan(difference.estimate.mean):
        return ["", "[dim]not comparable[/dim]"]
    low, high = difference.estimate.low, difference.estimate.high
    if name in NAMES and name != "loss":
        text = f"{low * 100:+.1f} to {high * 100:+.1f}"
    else:
        text = f"{low:+.4f} to {high:+.4f}"
    return [text, f"[{COLOURS[difference.verdict]}]{difference.verdict}[/{COLOURS[difference.verdict]}]"]


def _show_wrong(evaluation: Evaluation) -> None:
    """Show the first rows whose answers differ from their responses."""
    wrong = [row for row in evaluation.tuned.rows if row.scores.get("exact_match") == 0.0]
    if not wrong:
        return
    say(f"  [dim]{counted(len(wrong), 'answer')} not as wanted:[/dim]")
    for row in wrong[:SHOWN_ROWS]:
        _show_row(row)


def _show_row(row: ScoredRow) -> None:
    expected, answer = row.question.expected.strip(), (row.reply.answer or "").strip()
    say(f"  [bold]{escape(near(row.question.record.source))}[/bold] {escape(_short(row.question.asked))}")
    say(f"    [green]wanted[/green] {escape(_short(expected))}")
    say(f"    [yellow]answer[/yellow] {escape(_short(answer) or '(nothing)')}")


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 100 else f"{line[:99]}…"


def _show_next(model: str, data: list[str], evaluated: EvaluatedRun) -> None:
    if evaluated.folder is None:
        words = ["lorafit", "eval", model, *data, "--out", "evaluation"]
        show_next((typed(*words), "keep the metrics and every answer"))
