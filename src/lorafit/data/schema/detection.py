"""Detection: the shape of a dataset, from the fields of its first rows and the user's mapping."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from lorafit.data.schema.fields import Fields, is_empty
from lorafit.data.schema.preferences import labels_judge
from lorafit.data.schema.shapes import ANSWERS, LISTS, Shape, renamed
from lorafit.data.schema.unknown_rows import listed, table, unknown_rows
from lorafit.data.sources.raw_row import excerpt
from lorafit.errors import DataError, UsageError

MAPPABLE = (
    "system", "instruction", "input", "prompt", *ANSWERS, *LISTS, "tools", "history", "reasoning", "text",
)  # fmt: skip
OPTIONAL = ("system", "input", "tools", "history", "reasoning")


def check_map(mapped: Mapping[str, str]) -> None:
    """Raise UsageError if `--map` names an unknown field, or one field twice."""
    for ours in mapped:
        if ours not in MAPPABLE:
            near = difflib.get_close_matches(ours, MAPPABLE, n=1)
            fix = f"did you mean '{near[0]}'?" if near else "the left side is one of " + ", ".join(MAPPABLE)
            raise UsageError(f"'{ours}' is no field of a row", where="--map", fix=fix)
    theirs, count = Counter(mapped.values()).most_common(1)[0] if mapped else ("", 0)
    if count > 1:
        raise UsageError(f"the field '{excerpt(theirs, 30)}' is mapped twice", where="--map", fix="map it once")


def detect(rows: Sequence[Fields], mapped: Mapping[str, str], where: str) -> Shape:
    """Return the shape of most `rows`. Raises DataError with the field names if no shape is known."""
    check_map(mapped)
    _check_mapped_names(rows, mapped)
    if len(rows) == 1 and "input_ids" not in rows[0] and (found := table(rows[0], where)):
        raise DataError(found[0], where=where, fix=found[1])
    votes = Counter(shape for row in rows if (shape := _shape_of(renamed(row, mapped), mapped)))
    if not votes:
        what, fix = unknown_rows(rows, mapped, where)
        raise DataError(what, where=where, fix=fix)
    kind, answer = votes.most_common(1)[0][0]
    return Shape(kind, answer, dict(mapped), _labels_judge(rows, answer or kind, mapped))


def _labels_judge(rows: Sequence[Fields], answer: str, mapped: Mapping[str, str]) -> bool:
    own = [renamed(row, mapped) for row in rows if any(str(name).lower() == "label" for name in row)]
    return "label" not in mapped.values() and labels_judge(own, [answer])


def _check_mapped_names(rows: Sequence[Fields], mapped: Mapping[str, str]) -> None:
    """Raise UsageError if a required field is mapped to one that none of `rows` has."""
    names = {str(name) for row in rows for name in row} if mapped else set()
    for ours, theirs in mapped.items():
        if names and theirs not in names and ours not in OPTIONAL:
            near = difflib.get_close_matches(theirs, names, n=1)
            fix = f"did you mean '{near[0]}'?" if near else f"the rows have {listed(names)}"
            message = f"no row has the field '{excerpt(theirs, 30)}', which is mapped to '{ours}'"
            raise UsageError(message, where="--map", fix=fix)


def _shape_of(row: Fields, mapped: Mapping[str, str]) -> tuple[str, str] | None:
    if "text" in mapped and "text" in row:
        return "text", ""
    named = [name for name in ANSWERS if name in mapped and name in row]
    answers = [*named, *(name for name in ANSWERS if name in row and name not in named)]
    answer = next((name for name in answers if not is_empty(row[name])), answers[0] if answers else "")
    asked = [kind for kind in ("instruction", "prompt") if answer and kind in row]
    wished = [kind for kind in asked if kind in mapped]
    lists = [] if wished else [kind for kind in LISTS if _is_list(row.get(kind)) and not _awaits_choice(row, kind)]
    if lists:
        return lists[0], ""
    if asked:
        return (wished or asked)[0], answer
    return ("calls", "") if "query" in row and "answers" in row else None


def _awaits_choice(row: Fields, name: str) -> bool:
    """Return True if the turns end before an answer, with two answers to choose from beside them (LLaMA-Factory)."""
    turns = row[name]
    if not {"chosen", "rejected"} <= set(row) or not isinstance(turns, list) or not turns:
        return False
    last = turns[-1]
    return isinstance(last, dict) and last.get("role", last.get("from")) in ("user", "human")


def _is_list(value: Any) -> bool:
    if isinstance(value, dict):
        return bool({"role", "from"} & set(value)) and all(isinstance(column, list) for column in value.values())
    return isinstance(value, list) or (isinstance(value, str) and bool(LIST_AS_TEXT.match(value)))


LIST_AS_TEXT = re.compile(r'\s*(?:\[|"\s*\[)')
"""The beginning of a list in JSON, and of one that was written as JSON twice."""
