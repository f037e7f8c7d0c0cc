"""tasks: the demo's three tasks, as instruction rows over the world of `text`."""

from __future__ import annotations

import json
from collections.abc import Callable, Set
from dataclasses import dataclass
from pathlib import Path
from random import Random

from lorafit.demo.text import ISO_FORM, date, date_forms, order, order_sentence, ticket
from lorafit.errors import UsageError

HELD_OUT_SEED = "held-out"

Row = dict[str, str]


@dataclass(frozen=True, slots=True)
class Task:
    """Hold one task of the demo.

    Attributes:
        name: its name.
        draw: draws one row.
    """

    name: str
    draw: Callable[[Random], Row]


def _order_row(random: Random) -> Row:
    placed = order(random)
    wanted = {name: getattr(placed, name) for name in ("customer", "item", "quantity", "city")}
    return {
        "instruction": "Extract the order as JSON.",
        "input": order_sentence(random, placed),
        "response": json.dumps(wanted),
    }


def _date_row(random: Random) -> Row:
    forms = date_forms(*date(random))
    asked = random.choice([form for index, form in enumerate(forms) if index != ISO_FORM])
    return {"instruction": "Rewrite the date as YYYY-MM-DD.", "input": asked, "response": forms[ISO_FORM]}


def _ticket_row(random: Random) -> Row:
    filed = ticket(random)
    return {"instruction": "Route this ticket to a queue.", "input": f"{filed.text}.", "response": filed.queue}


TASKS = {
    task.name: task
    for task in (
        Task("orders", _order_row),
        Task("dates", _date_row),
        Task("tickets", _ticket_row),
    )
}


def task_named(name: str) -> Task:
    """Return the task called `name`. Raises UsageError with all names if it does not exist."""
    if name not in TASKS:
        raise UsageError(f"there is no demo task '{name}'", where="--task", fix=f"choose one of {', '.join(TASKS)}")
    return TASKS[name]


def rows(task: Task, seed: int | str, count: int, exclude: Set[str] = frozenset()) -> list[Row]:
    """Return `count` rows with distinct inputs, none of them in `exclude`."""
    random, seen = Random(f"{task.name}-{seed}"), set(exclude)
    drawn: list[Row] = []
    while len(drawn) < count:
        row = task.draw(random)
        if row["input"] not in seen:
            seen.add(row["input"])
            drawn.append(row)
    return drawn


def split_files(task: Task, folder: Path) -> tuple[Path, Path]:
    """Return the files of the training rows and of the held-out rows."""
    return folder / f"{task.name}-train.jsonl", folder / f"{task.name}-held-out.jsonl"


def write_split(task: Task, folder: Path, seed: int, train_count: int, held_out_count: int) -> tuple[Path, Path]:
    """Write `NAME-train.jsonl` and `NAME-held-out.jsonl`. Held-out rows are the same for every seed."""
    held_out = rows(task, HELD_OUT_SEED, held_out_count)
    train = rows(task, seed, train_count, frozenset(row["input"] for row in held_out))
    folder.mkdir(parents=True, exist_ok=True)
    paths = split_files(task, folder)
    for path, part in zip(paths, (train, held_out), strict=True):
        path.write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
    return paths
