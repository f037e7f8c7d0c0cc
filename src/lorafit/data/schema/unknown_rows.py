"""Unknown rows: what rows of no known shape probably are, and how to convert them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lorafit.data.schema.exports import better_answers, export_of
from lorafit.data.schema.fields import Fields
from lorafit.data.sources.raw_row import excerpt

ASKS = ("instruction", "prompt", "question", "query", "input", "user", "ask", "problem", "text", "sentence")
SAYS = ("response", "output", "completion", "answer", "target", "reply", "assistant", "solution", "label", "answers")
CHOSEN = ("chosen", "preferred_output", "chosen_response")
REJECTED = ("rejected", "non_preferred_output", "rejected_response")


def listed(names: Iterable[str]) -> str:
    """Return the first twelve names, sorted, as a sentence part."""
    return ", ".join(sorted({excerpt(name, 30) for name in names})[:12]) or "none"


def unknown_rows(rows: Sequence[Fields], mapped: Mapping[str, str], where: str) -> tuple[str, str]:
    """Return (the problem, the fix) of rows that have none of the known shapes."""
    first = next((row for row in rows if row), {})
    if "input_ids" in first:
        return "the rows are token ids ('input_ids')", "name the file with the texts that they were made of"
    wrapped = _wrapper(first, where) if len(rows) == 1 else None
    for trouble in (_preferences(first, where), export_of(first, where), _export(first), wrapped, _text(rows)):
        if trouble:
            return trouble
    names = listed(str(name) for row in rows[:100] for name in row)
    what = f"the rows' fields ({names}) are none of instruction/response, prompt/completion, messages, conversations"
    flags = suggested_map(first, mapped)
    if where.lower().endswith((".csv", ".tsv")) and any(not str(name)[:1].isalpha() for name in first):
        return what, "put a line with the columns' names above the first row, as prompt,completion"
    return what, f"name them, as in {flags}" if flags else 'write each row as {"instruction": "…", "response": "…"}'


def suggested_map(row: Fields, mapped: Mapping[str, str]) -> str:
    """Return `--map` with the row's own columns; empty if it has no two texts."""
    for name, value in row.items():
        if isinstance(value, list) and value and all(isinstance(turn, dict) for turn in value):
            return _list_flags(row, str(name))
    apart = (*mapped.values(), "system", "system_prompt", "context", "history")
    texts = [str(name) for name, value in row.items() if isinstance(value, str) and name not in apart]
    texts = [name for name in texts if not ABOUT.fullmatch(name)]
    asks, says = _nearest(texts, ASKS), _nearest(texts, SAYS)
    left = [name for name in texts if name not in (asks, says)]
    if not asks and left:  # beside a known answer, the longest text is what was asked
        asks = max(left, key=lambda name: len(row[name])) if says else left[0]
        left.remove(asks)
    says = says or (left.pop(0) if left else "")
    if not asks or not says:
        return ""
    ours = "instruction" if asks != "prompt" else "prompt"
    return " ".join(_flag(*pair) for pair in ((ours, asks), ("response", says)) if pair[0] != pair[1])


def _list_flags(row: Fields, name: str) -> str:
    """Return `--map` for a list of turns: the whole conversation, or the prompt of a separate answer."""
    last = row[name][-1]
    speaker = str(last.get("role", last.get("from", ""))).lower()
    answer = _nearest([str(other) for other, value in row.items() if isinstance(value, str)], (*SAYS, "ideal"))
    if speaker in ("assistant", "gpt", "model") or not answer:
        return _flag("messages", name)
    pairs = (("prompt", name), *((("response", answer),) if answer not in SAYS[:4] else ()))
    return " ".join(_flag(*pair) for pair in pairs if pair[0] != pair[1])


def _flag(ours: str, theirs: str) -> str:
    plain = theirs.replace("_", "").replace("-", "").isalnum()
    return f"--map {ours}={theirs}" if plain else f"--map '{ours}={theirs}'"


ABOUT = re.compile(
    r"(?i)(?:.*[ _-])?(?:u?u?id|idx|index|hash|source|url|category|topic|lang|language|model|type|date|split)"
)
"""Columns that say something about a row, and are neither its question nor its answer."""


def _nearest(names: Sequence[str], wanted: Sequence[str]) -> str:
    """Return the first of `names` that equals or contains one of `wanted`, ignoring case."""
    for one in wanted:
        for name in names:
            if name.lower() == one:
                return name
    return next((name for one in wanted for name in names if one in name.lower()), "")


def _preferences(row: Fields, where: str) -> tuple[str, str] | None:
    """Recognise pairs of a better and a worse answer (DPO)."""
    better, worse = (next((name for name in names if name in row), "") for names in (CHOSEN, REJECTED))
    if not better or not worse:
        return None
    what = f"the rows are preference data ('{better}' and '{worse}'), and lorafit trains on one answer a row"
    if line := better_answers(row, better, where):
        return what, f"train on the better answers: {line}"
    if isinstance(row[better], str):
        asks = _nearest([str(name) for name in row], ASKS) or "prompt"
        ask = "" if asks in ("prompt", "instruction") else f"{_flag('prompt', asks)} "
        return what, f"train on the better answers: {ask}{_flag('completion', better)}"
    if "prompt" in row and isinstance(row[better], list) and _begins_with_answer(row[better]):
        return what, f"train on the better answers: {_flag('completion', better)}"
    return what, f"train on the better answers: {_flag('messages', better)}"


def _begins_with_answer(turns: list[Any]) -> bool:
    return bool(turns) and isinstance(turns[0], dict) and turns[0].get("role") == "assistant"


def container(row: Any, where: str) -> tuple[str, str] | None:
    """Return (its title, the line that unpacks it) of one JSON object that holds all rows, or None."""
    return (table(row, where) or _wrapper(row, where)) if isinstance(row, dict) and row else None


NO_WRAPPERS = ("messages", "conversation", "contents", "tools", "functions", "choices", "completions", "answers")
"""Names of lists that belong to one row."""


def _wrapper(row: Fields, where: str) -> tuple[str, str] | None:
    lists = [name for name, value in row.items() if _is_rows(value)]
    if len(lists) == 1 and not lists[0].startswith(NO_WRAPPERS):
        name = lists[0]
        return f"the file is one object whose '{excerpt(name, 30)}' holds the rows", _unpacked(where, f"d[{name!r}]")
    if _keyed(row):
        return "the file is one object that holds each row under a name of its own", _unpacked(where, "d.values()")
    return None


def table(row: Fields, where: str) -> tuple[str, str] | None:
    """Do as `container`, but only for an object whose every member is one column."""
    values = list(row.values())
    if len(values) < 2 or _keyed(row):
        return None
    if all(_is_index(value) for value in values) and len({tuple(value) for value in values}) == 1:
        rows = "[dict(zip(d, r)) for r in zip(*(c.values() for c in d.values()))]"
        return "the file is a table by columns, as pandas' to_json writes it", _unpacked(where, rows)
    if all(_is_column(value) for value in values) and len({len(value) for value in values}) == 1:
        rows = "[dict(zip(d, r)) for r in zip(*d.values())]"
        return "the file is a table by columns, one list for each", _unpacked(where, rows)
    return None


def _keyed(row: Fields) -> bool:
    """Return True if an object holds one row under each name, as pandas' orient="index" writes them."""
    rows = list(row.values())
    if len(rows) < 2 or not all(isinstance(one, dict) and one for one in rows):
        return False
    labels = set(map(str, rows[0]))
    same = all(set(map(str, one)) == labels for one in rows)
    return same and not any(label.isdigit() for label in labels) and (all(map(str.isdigit, row)) or len(labels) == 2)


def _is_rows(value: Any) -> bool:
    if not isinstance(value, list) or not value or not all(isinstance(row, dict) for row in value):
        return False
    return not any({"role", "from", "parts", "speaker"} & set(row) for row in value)


def _is_index(value: Any) -> bool:
    """Return True if an object is a pandas column: cells by index label, not a record of named fields."""
    return isinstance(value, dict) and bool(value) and (len(value) > 2 or all(label.isdigit() for label in value))


def _is_column(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and not any(isinstance(cell, dict) for cell in value)


def _unpacked(where: str, rows: str) -> str:
    code = f"import json; d = json.load(open({where!r}, encoding='utf-8')); [print(json.dumps(r)) for r in {rows}]"
    return f'python -c "{code}" > rows.jsonl'


def _export(row: Fields) -> tuple[str, str] | None:
    """Recognise whole conversations in one text."""
    for name, value in row.items():
        if isinstance(value, str) and re.search(r"(?i)\b(user|human):.*\bassistant:", value, re.DOTALL):
            what = f"the field '{excerpt(str(name), 30)}' holds a whole conversation as one text"
            return what, "write its turns as messages, or train on every token of it: " + _flag("text", str(name))
    return None


def _text(rows: Sequence[Fields]) -> tuple[str, str] | None:
    if not rows or not all("text" in row for row in rows) or any({*SAYS} & {*row} for row in rows):
        return None
    what = "the rows have a 'text' and do not say what of it is asked and what is answered"
    return what, "write prompt and completion, or --map text=text to train on every token of it"
