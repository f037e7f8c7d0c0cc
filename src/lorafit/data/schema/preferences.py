"""Preferences: several answers of which one is the better, and rows that say whether their answer is a good one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from lorafit.data.schema.exports import OUT, better_answers, rewritten
from lorafit.data.schema.fields import Fields, is_empty
from lorafit.data.schema.names import words_of
from lorafit.data.schema.side_columns import ROW_FLAG
from lorafit.data.schema.turns import speakers_in

ASKS = ("instruction", "prompt", "question", "query", "message", "input", "user", "ask", "problem", "text", "sentence")
SAYS = (
    *("response", "output", "completion", "answer", "target", "reply", "assistant", "solution", "ideal", "expected"),
    *("label", "answers"),
)
CHOSEN = ("chosen", "preferred_output", "chosen_response")
REJECTED = ("rejected", "non_preferred_output", "rejected_response")


def flag(ours: str, theirs: str) -> str:
    plain = theirs.replace("_", "").replace("-", "").isalnum()
    return f"--map {ours}={theirs}" if plain else f"--map '{ours}={theirs}'"


def nearest(names: Sequence[str], wanted: Sequence[str]) -> str:
    """Return the first of `names` that equals or contains one of `wanted`, ignoring case."""
    for one in wanted:
        for name in names:
            if name.lower() == one:
                return name
    return next((name for one in wanted for name in names if one in name.lower()), "")


def better_and_worse(row: Fields, where: str) -> tuple[str, str] | None:
    """Recognise pairs of a better and a worse answer (DPO)."""
    better, worse = (next((name for name in names if name in row), "") for names in (CHOSEN, REJECTED))
    if not better or not worse:
        return None
    what = f"the rows are preference data ('{better}' and '{worse}'), and lorafit trains on one answer a row"
    if line := better_answers(row, better, where):
        return what, f"train on the better answers: {line}"
    if isinstance(row[better], str):
        asks = nearest([str(name) for name in row], ASKS) or "prompt"
        ask = "" if asks in ("prompt", "instruction") else f"{flag('prompt', asks)} "
        return what, f"train on the better answers: {ask}{flag('completion', better)}"
    if "prompt" in row and isinstance(row[better], list) and _begins_with_answer(row[better]):
        return what, f"train on the better answers: {flag('completion', better)}"
    return what, f"train on the better answers: {flag('messages', better)}"


OF_ANSWERS = re.compile(
    r"(?i)(?P<stem>.*(?:response|answer|output|completion|reply|generation|conversation|candidate|summary|human_ref|chat)"
    r"[a-z]*?)[ _-]?(?P<mark>[abjk]|[0-9])"
)
"""One of several answers in columns side by side: response_a, answer_1, OutputB."""
VERDICT = re.compile(
    r"(?i)(?:.*[ _-])?(?:winner|winning|prefer(?:ence|red)?|better|best|verdict|choice|chosen)"
    r"(?:[ _-](?:id|idx|index|label|model|answer|response|output|side))*"
)
"""A column that names the better answer; one that measures how much better it is, as preference_strength, does not."""
PICK = r"(?:(?:model|response|answer|output|completion|option|candidate|assistant|reply|conversation)[ _-]*)?"
TIE = re.compile(r"(?i).*(?:tie|both|neither|none|draw|equal)|\W*")


def several_answers(rows: Sequence[Fields], where: str) -> tuple[str, str] | None:
    """Recognise several answers side by side, with or without a verdict which of them is the better one."""
    first = next((row for row in rows if row), {})
    marked = answer_columns(first)
    if len(marked) < 2:
        return None
    names = list(marked.values())
    verdict = next((str(name) for name in first if VERDICT.fullmatch(str(name)) and name not in names), "")
    listing = " and ".join(f"'{name}'" for name in names[:2])
    if not verdict:
        what = f"the rows hold several answers each ({listing}), and lorafit trains on one answer a row"
        return what, f"choose the one to learn, as in {_chosen_flags(first, names[0])}"
    what = f"the rows are preference data ({listing}, judged in '{verdict}'), and lorafit trains on one answer a row"
    words = {_word(row.get(verdict)) for row in rows if row}
    is_turns = bool(speakers_in(first[names[0]]))
    ours = "messages" if is_turns else "response"
    if any(not TIE.fullmatch(word) and not any(_picks(word, mark) for mark in marked) for word in words):
        return what, f"write the better answer of each row into '{ours}', and leave the others out"
    word = f"str(q[{verdict!r}]).lower().removesuffix('.0')"
    each = f"[a for s, a in {list(marked.items())} if re.fullmatch('{PICK}' + s, {word})]"
    kept = f"{{k: v for k, v in q.items() if k not in {[*names, verdict]}}}"
    line = rewritten(where, f"{{**{kept}, {ours!r}: q[r]}}", each, beside=", re")
    asks = nearest([str(name) for name in first if name not in names], ASKS)
    if is_turns or asks in ("prompt", "instruction") or not asks:
        return what, f"train on the better answers: {line}"
    return what, f"train on the better answers: {line} && lorafit check {OUT} {flag('instruction', asks)}"


def answer_columns(row: Fields) -> dict[str, str]:
    """Return {mark: column} of the answers side by side in a row; less than two are none."""
    stems: dict[str, dict[str, str]] = {}
    for name, value in row.items():
        if (match := OF_ANSWERS.fullmatch(str(name))) and isinstance(value, str | list | dict):
            stems.setdefault(match["stem"].lower(), {})[match["mark"].lower()] = str(name)
    return max(stems.values(), key=len, default={})


def _word(value: Any) -> str:
    return "" if value is None else str(value).lower().removesuffix(".0")


def _picks(word: str, mark: str) -> bool:
    """Return True if a verdict means the answer of this mark: 1, a, model_a. The name of a model means none."""
    return re.fullmatch(PICK + mark, word) is not None


def _chosen_flags(row: Fields, answer: str) -> str:
    if speakers_in(row[answer]):
        return flag("messages", answer)
    texts = [str(name) for name, value in row.items() if isinstance(value, str) and name != answer]
    asks = nearest([name for name in texts if not OF_ANSWERS.fullmatch(name)], ASKS)
    ask = "" if asks in ("prompt", "instruction", "") else f"{flag('instruction', asks)} "
    return f"{ask}{flag('response', answer)}"


def _begins_with_answer(turns: list[Any]) -> bool:
    return bool(turns) and isinstance(turns[0], dict) and turns[0].get("role") == "assistant"


def labels_judge(rows: Sequence[Fields], answers: Sequence[str]) -> bool:
    """Return True if labels of 0 and 1 say which answers are good, as in KTO's data.

    They are classes if an answer follows from its label: a few answers, each with one label.
    """
    pairs = [(_word(row["label"]), _answer_in(row, answers)) for row in rows if not is_empty(row.get("label"))]
    if not pairs or not {label for label, _ in pairs} <= {"0", "1"}:
        return False
    texts = {text for _, text in pairs}
    return not (len(set(pairs)) == len(texts) <= 2 < len(pairs))


def _answer_in(row: Fields, names: Sequence[str]) -> str:
    return next((str(row[name]) for name in names if not is_empty(row.get(name))), "")


APPROVED = frozenset(("accepted", "approved", "chosen", "preferred", "desirable", "upvoted", "kto"))
REFUSED = frozenset(("rejected", "undesirable", "disliked", "downvoted"))
"""Words of columns that say whether an answer is a good one: false beside the first, true beside the second is bad."""


@lru_cache(1024)
def _judging(names: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    """Return (column, the word that calls its answer bad) of those of `names` that judge an answer."""
    found = []
    for name in names:
        words = set(words_of(name)) if isinstance(name, str) else set()
        if words & REFUSED or {"thumbs", "down"} <= words:
            found.append((name, "true"))
        elif words & APPROVED or {"thumbs", "up"} <= words:
            found.append((name, "false"))
        elif words == {"thumbs"}:
            found.append((name, "down"))
    return tuple(found)


@lru_cache(1024)
def _siblings(names: tuple[str, ...], answer: str) -> tuple[tuple[str, ...], str, str]:
    """Return (marks of the answers side by side with this one, its own mark, the column of the verdict)."""
    marked = answer_columns(dict.fromkeys(names, ""))
    verdict = next((name for name in names if VERDICT.fullmatch(str(name)) and name not in marked.values()), "")
    mark = next((mark for mark, name in marked.items() if name == answer), "")
    return (tuple(marked), mark, verdict) if mark and len(marked) > 1 else ((), "", "")


def judged_bad(row: Fields, answer: str) -> str:
    """Return what a row says against its own answer, which stands in the column `answer`; empty if nothing does."""
    names = tuple(row)
    for name, bad in _judging(names):
        if isinstance(row[name], bool | str) and _word(row[name]) == bad:
            return f"{ROW_FLAG} '{name}' says that its answer is not to be learnt"
    marks, mark, verdict = _siblings(names, answer)
    if verdict and any(_picks(_word(row[verdict]), other) for other in marks if other != mark):
        return f"{ROW_FLAG} '{verdict}' prefers another answer than '{answer}'"
    return ""
