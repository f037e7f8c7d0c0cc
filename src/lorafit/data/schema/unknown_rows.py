"""Unknown rows: what rows of no known shape probably are, and how to convert them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lorafit.data.schema.exports import OUT, export_of, rewritten
from lorafit.data.schema.fields import Fields, is_empty
from lorafit.data.schema.preferences import ASKS, SAYS, VERDICT, better_and_worse, flag, nearest, several_answers
from lorafit.data.schema.side_columns import suggested_places
from lorafit.data.schema.turns import CALL, exchange_in, speakers_in
from lorafit.data.sources.raw_row import excerpt


def listed(names: Iterable[str]) -> str:
    """Return the first twelve names, sorted, as a sentence part."""
    return ", ".join(sorted({excerpt(name, 30) for name in names})[:12]) or "none"


def unknown_rows(rows: Sequence[Fields], mapped: Mapping[str, str], where: str) -> tuple[str, str]:
    """Return (the problem, the fix) of rows that have none of the known shapes."""
    first = next((row for row in rows if row), {})
    if "input_ids" in first:
        return "the rows are token ids ('input_ids')", "name the file with the texts that they were made of"
    if len(rows) == 1 and first and OF_A_SERVER.issuperset(first) and {"error", "message", "detail"} & set(first):
        return "the file holds a server's message in place of rows", "download the file again, and open it first"
    wrapped = _wrapper(first, where) if len(rows) == 1 else None
    found = (
        better_and_worse(first, where),
        several_answers(rows, where),
        export_of(first, where),
        _inside(first, where),
    )
    for trouble in (*found, _export(first), wrapped, _text(rows)):
        if trouble:
            return trouble
    names = listed(str(name) for row in rows[:100] for name in row)
    what = f"the rows' fields ({names}) are none of instruction/response, prompt/completion, messages, conversations"
    flags = suggested_map(first, mapped)
    if where.lower().endswith((".csv", ".tsv")) and any(not str(name)[:1].isalpha() for name in first):
        return what, "put a line with the columns' names above the first row, as prompt,completion"
    return what, f"name them, as in {flags}" if flags else 'write each row as {"instruction": "…", "response": "…"}'


OF_A_SERVER = frozenset(
    ("error", "errors", "message", "detail", "status", "code", "documentation_url", "statusCode", "type")
)
"""Fields of an answer that a server gives in place of a file."""


def suggested_map(row: Fields, mapped: Mapping[str, str]) -> str:
    """Return `--map` with the row's own columns; empty if it has no two texts."""
    if spoken := {str(name): speakers for name, value in row.items() if (speakers := speakers_in(value))}:
        return _turn_flags(row, spoken, mapped)
    apart = (*mapped.values(), "system", "system_prompt", "context", "history")
    texts = [str(name) for name, value in row.items() if isinstance(value, str) and name not in apart]
    asks, says = _two_texts(row, [name for name in texts if not ABOUT.fullmatch(name)])
    if not asks or not says:
        return ""
    ours = "instruction" if asks != "prompt" else "prompt"
    return _flags((ours, asks), ("response", says))


def _two_texts(row: Fields, texts: Sequence[str]) -> tuple[str, str]:
    """Return which of the columns `texts` is the question, and which the answer; empty where there is none."""
    known = {*ASKS, *SAYS}  # a column called Response may hold numbers, as of sums; a running number is neither
    worded = [name for name in texts if name.lower() in known or not NUMBER.fullmatch(row[name].strip())]
    texts = worded if len(worded) > 1 else texts
    asks, says = nearest(texts, ASKS), nearest(texts, SAYS)
    if asks == says and texts:
        asks = ""
    left = [name for name in texts if name not in (asks, says)]
    if not asks and left:  # beside a known answer, the longest text is what was asked
        asks = max(left, key=lambda name: len(row[name])) if says else left[0]
        left.remove(asks)
    return asks, says or (left.pop(0) if left else "")


def _turn_flags(row: Fields, spoken: Mapping[str, Sequence[str]], mapped: Mapping[str, str]) -> str:
    """Return `--map` for lists of turns.

    They are a whole conversation, the prompt of a separate answer, or the history of a separate question.
    """
    texts = [name for name, value in row.items() if isinstance(value, str) and name not in spoken]
    said = [name for name, speakers in spoken.items() if speakers[-1] in ("assistant", CALL)]
    asked = [name for name in spoken if name not in said]
    system = [one for one in suggested_places(texts, row, mapped) if "system=" in one]
    known = [name for name in texts if nearest([name], SAYS)]
    if asked and (says := nearest(said, SAYS) or next(iter(said), "") or nearest(known, SAYS)):
        flags = _flags(("prompt", asked[0]), *((("response", says),) if says not in SAYS[:4] else ()))
    elif said and not asked and "history" in said[0] and all(two := _two_texts(row, texts)):
        flags = _flags(("instruction", two[0]), ("history", said[0]), ("response", two[1]))
    elif said and not asked and (ask := nearest(texts, ASKS)) and spoken[said[0]][0] in ("assistant", CALL, "thought"):
        flags = _flags(("prompt", ask), *((("response", said[0]),) if said[0] not in SAYS[:4] else ()))
    else:
        whole = next((name for name, speakers in spoken.items() if {"assistant", CALL} & set(speakers)), "")
        flags = _flags(("messages", whole)) if whole else ""
    return " ".join([flags, *system]) if flags else ""


def _flags(*pairs: tuple[str, str]) -> str:
    return " ".join(flag(*pair) for pair in pairs if pair[0] != pair[1])


ABOUT = re.compile(
    r"(?i)(?:.*[ _-])?(?:u?u?id|idx|index|hash|source|url|category|topic|lang|language|model|type|date|split)"
)
"""Columns that say something about a row, and are neither its question nor its answer."""
NUMBER = re.compile(r"[#\d][\d.,:/ -]*")
"""A value that is a number, a date or a time."""


HOLDS_QUESTION = ("input", "inputs", "request")
HOLDS_ANSWER = ("output", "outputs", "expected_output", "expectedOutput", "reference_outputs", "response", "expected")


def _inside(row: Fields, where: str) -> tuple[str, str] | None:
    """Recognise questions and answers as fields of other fields, as Langfuse and LangSmith export them."""
    asks, says = (
        next((name for name in names if not is_empty(row.get(name))), "") for names in (HOLDS_QUESTION, HOLDS_ANSWER)
    )
    sides = [(name, row.get(name)) for name in (asks, says)]
    if not asks or not says or not any(isinstance(value, dict) for _, value in sides):
        return None
    texts = [_texts_of(name, value) for name, value in sides]
    if not all(texts):
        return None
    what = f"the rows' texts stand inside of '{asks}' and '{says}'"
    if len(texts[0]) == len(texts[1]) == 1:
        (asked,), (said,) = (list(side.values()) for side in texts)
        return what, rewritten(where, f"{{'instruction': {asked}, 'response': {said}}}")
    parts = [f"**r[{name!r}]" if isinstance(value, dict) else f"{name!r}: r[{name!r}]" for name, value in sides]
    merged = {
        key: value
        for name, held in sides
        for key, value in (held.items() if isinstance(held, dict) else [(name, held)])
    }
    if set(texts[0]) & set(texts[1]):
        return what, 'write each row as {"instruction": "…", "response": "…"}'
    line, flags = rewritten(where, f"{{{', '.join(parts)}}}"), suggested_map(merged, {})
    return what, f"{line} && lorafit check {OUT} {flags}".rstrip()


def _texts_of(name: str, value: Any) -> dict[str, str]:
    """Return {name of a text: its expression} of a text, or of the texts in an object."""
    if isinstance(value, str):
        return {name: f"r[{name!r}]"}
    held = value if isinstance(value, dict) else {}
    return {str(key): f"r[{name!r}][{key!r}]" for key, text in held.items() if isinstance(text, str)}


def container(row: Any, where: str) -> tuple[str, str] | None:
    """Return (its title, the line that unpacks it) of one JSON object that holds all rows, or None."""
    return (table(row, where) or _wrapper(row, where)) if isinstance(row, dict) and row else None


NO_WRAPPERS = ("messages", "conversation", "contents", "tools", "functions", "choices", "completions", "answers")
"""Names of lists that belong to one row."""
ASKS_ITSELF = frozenset(ASKS) - {"message", "user", "text", "input"}
"""Names of columns by which an object is a row itself, and no wrapper of rows."""


def _wrapper(row: Fields, where: str) -> tuple[str, str] | None:
    lists = [name for name, value in row.items() if _is_rows(value)]
    if lists and any(str(name).lower() in ASKS_ITSELF or VERDICT.fullmatch(str(name)) for name in row):
        return None
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
    if speakers_in(value) and not any(exchange_in(row) for row in value):
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
            return what, "write its turns as messages, or train on every token of it: " + flag("text", str(name))
    return None


def _text(rows: Sequence[Fields]) -> tuple[str, str] | None:
    if not rows or not all("text" in row for row in rows) or any({*SAYS, "message"} & {*row} for row in rows):
        return None
    what = "the rows have a 'text' and do not say what of it is asked and what is answered"
    return what, "write prompt and completion, or --map text=text to train on every token of it"
