"""Preferences: several answers of which one is the better, and rows that say whether their answer is a good one."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
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
TIE = re.compile(r"(?i).*(?:(?:\b|_)tie|both|neither|none|draw|equal).*|\W*")


def several_answers(rows: Sequence[Fields], where: str) -> tuple[str, str] | None:
    """Recognise several answers in a row, with or without a verdict which of them is the better one."""
    first = next((row for row in rows if row), {})
    marked = answer_columns(first)
    if len(marked) < 2:
        return _listed_answers(rows, first, where)
    names = list(marked.values())
    listing = " and ".join(f"'{name}'" for name in names[:2])
    one = "and lorafit trains on one answer a row"
    beside, low = measures(tuple(map(str, first)), tuple(marked))
    if beside and all(_number(first[name]) is not None for name in beside.values()):
        pairs = ", ".join(f"(q[{beside[mark]!r}], q[{name!r}])" for mark, name in marked.items())
        what = f"the rows are preference data ({listing}, judged in '{next(iter(beside.values()))}'), {one}"
        return what, _best_of(first, names, f"b([{pairs}])", _best(low), where)
    verdict = next((str(name) for name in first if VERDICT.fullmatch(str(name)) and name not in names), "")
    words = {_word(row.get(verdict)) for row in rows if row}
    signed = len(names) == 2 and _signed(first, verdict, words)
    what = f"the rows are preference data ({listing}, judged in '{signed or verdict}'), {one}"
    if signed:
        pairs = f"(-f(q[{signed!r}]), q[{names[0]!r}]), (f(q[{signed!r}]), q[{names[1]!r}])"
        each = f"b([{pairs}] if f(q[{signed!r}]) is not None else [])"
        says = f"if a number below 0 in '{signed}' prefers '{names[0]}', "
        return what, says + _best_of(first, names, each, _best(low=False), where)
    if not verdict:
        what = f"the rows hold several answers each ({listing}), {one}"
        if judged := next((name for name in map(str, first) if JUDGING & set(words_of(name))), ""):
            return what, f"if '{judged}' names the better one, write that one into 'response', and leave the others out"
        return what, f"choose the one to learn, as in {_chosen_flags(first, names[0])}"
    return what, _by_word(first, marked, verdict, words, where)


def _by_word(row: Fields, marked: Mapping[str, str], verdict: str, words: set[str], where: str) -> str:
    """Return the fix of rows whose `verdict` names the better one of the columns `marked` in a word."""
    names = list(marked.values())
    is_turns = bool(speakers_in(row[names[0]]))
    ours = "messages" if is_turns else "response"
    if any(not TIE.fullmatch(word) and not any(_picks(word, mark) for mark in marked) for word in words):
        return f"write the better answer of each row into '{ours}', and leave the others out"
    word = f"str(q[{verdict!r}]).lower().removesuffix('.0')"
    each = f"[a for s, a in {list(marked.items())} if re.fullmatch('{PICK}' + s, {word})]"
    kept = f"{{k: v for k, v in q.items() if k not in {[*names, verdict]}}}"
    line = rewritten(where, f"{{**{kept}, {ours!r}: q[r]}}", each, beside=", re")
    asks = nearest([str(name) for name in row if name not in names], ASKS)
    if is_turns or asks in ("prompt", "instruction") or not asks:
        return f"train on the better answers: {line}"
    return f"train on the better answers: {line} && lorafit check {OUT} {flag('instruction', asks)}"


MEASURES = (
    *("winner", "win", "wins", "preferred", "chosen", "best", "better", "overall", "score", "scores", "rating"),
    *("ratings", "reward", "rewards", "votes", "upvotes", "points", "likes", "grade", "grades"),
    *("correct", "selected", "accepted"),
)
RANKS = ("rank", "ranks", "ranking", "rankings", "place")
"""Words of columns that measure one answer of several: the best has the most of the first, the least of the second."""
JUDGING = frozenset(("label", "labels", "preference", "strength", "judgement", "judgment", "vote"))
"""Words of columns that may name the better answer, in a way that tools do not agree on."""
PART = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|[0-9]+")


@lru_cache(1024)
def measures(names: tuple[str, ...], marks: tuple[str, ...]) -> tuple[Mapping[str, str], bool]:
    """Return ({mark: column that measures its answer}, whether the least is best), as score_A and score_B."""
    groups: dict[tuple[str, ...], dict[str, str]] = {}
    for name in names:
        parts = [part.lower() for part in PART.findall(name)]
        found = [part for part in parts if part in marks]
        if len(found) == 1:
            groups.setdefault(tuple(part for part in parts if part != found[0]), {})[found[0]] = name
    for word in (*MEASURES, *RANKS):
        for words, group in groups.items():
            if word in words and len(group) == len(marks) and not {"ratio", "count", "id", "time"} & set(words):
                return group, word in RANKS
    return {}, False


def _number(value: Any) -> float | None:
    """Return a number, also in a text, as CSV has it, and of true and false; None for any other value."""
    try:
        return float({"true": 1, "false": 0}.get(str(value).lower(), value))
    except (TypeError, ValueError):
        return None


def _signed(row: Fields, verdict: str, words: set[str]) -> str:
    """Return the column whose sign names the better one of two answers, as HelpSteer's preference_strength."""
    for name in map(str, row):
        parts = set(words_of(name))
        if "preference" in parts and parts & {"strength", "overall"} and _number(row[name]) is not None:
            return name
    numbers = [_number(word) for word in words if word]
    return verdict if any(number is not None and number < 0 for number in numbers) and None not in numbers else ""


def _best(low: bool) -> str:
    """Return the statement that defines b, which picks the best one of (number, answer), and none where they tie."""
    sign = "-" * low
    return (
        "f = lambda v: None if str(v).strip() in ('', 'None', 'nan') else "
        "float({'true': 1, 'false': 0}.get(str(v).lower(), v)); "
        f"b = lambda p: (lambda p: [a for n, a in p if len(p) > 1 and [m for m, _ in p if m >= n] == [n]])"
        f"([({sign}f(n), a) for n, a in p if f(n) is not None]); "
    )


def _best_of(row: Fields, answers: Sequence[str], each: str, before: str, where: str) -> str:
    """Return the fix that writes each row's question with the answer that `each` picks."""
    if speakers_in(row.get(answers[0])):
        line = rewritten(where, "{'messages': r}", each, before)
        return f"train on the better answers: {line}"
    apart = [name for name in map(str, row) if name not in answers and not OF_ANSWERS.fullmatch(name)]
    ours, asked = _asked(row, apart)
    if not asked:
        return "write the better answer of each row into 'response', and leave the others out"
    beside = [name for name in ("system", "system_prompt", "tools") if name in row]
    kept = f"**{{k: q[k] for k in {beside} if k in q}}, " if beside else ""
    line = rewritten(where, f"{{{kept}{ours!r}: {asked}, 'response': r}}", each, before)
    return f"train on the better answers: {line}"


def _asked(row: Fields, names: Sequence[str]) -> tuple[str, str]:
    """Return (our field, the expression) of what a row asks: turns, a text, or a text within an object."""
    if turns := next((name for name in names if speakers_in(row[name])), ""):
        return "prompt", f"q[{turns!r}]"
    plain = {name: row[name] for name in names if isinstance(row[name], str) and name not in SYSTEM_NAMES}
    if found := nearest(list(plain), (*ASKS, "history", "context", "post")):
        return "instruction", f"q[{found!r}]"
    for name in names:
        inner = (
            {key: text for key, text in row[name].items() if isinstance(text, str)}
            if isinstance(row[name], dict)
            else {}
        )
        if found := nearest(list(inner), ("full_text", "post", *ASKS)):
            return "instruction", f"q[{name!r}][{found!r}]"
    longest = max(plain, key=lambda name: len(plain[name]), default="")
    return "instruction", f"q[{longest!r}]" if longest else ""


SYSTEM_NAMES = ("system", "system_prompt")
SAID_IN = ("text", "response", "content", "answer", "output", "completion", "summary", "generation", "message")


def _listed_answers(rows: Sequence[Fields], row: Fields, where: str) -> tuple[str, str] | None:
    """Recognise several answers in one list, measured in their own fields, in another list, or by a verdict."""
    for name, value in row.items():
        texts, said = _texts_in_list(value)
        if not texts:
            continue
        text, path = f"a[{said!r}]" if said else "a", f"q[{name!r}]"
        apart = [str(other) for other in row if other != name]
        judged, pairs, low = "", "", False
        if said and (judged := _measure(value[0])):
            pairs = f"[(a.get({judged!r}), {text}) for a in {path}]"
        elif judged := _measure({key: one[0] for key in apart if _are_numbers(one := row[key], len(value))}):
            pairs = f"[(n, {text}) for n, a in zip(q[{judged!r}], {path})]"
        elif judged := next((key for key in apart if VERDICT.fullmatch(key) and _number(row[key]) is not None), ""):
            numbers = {_number(one.get(judged)) for one in rows if one}
            starts = 0 if 0 in numbers else 1
            pairs = f"[(i == f(q[{judged!r}]), {text}) for i, a in enumerate({path}, {starts})]"
        if judged:
            low = bool(set(words_of(judged)) & set(RANKS))
            what = f"the rows are preference data (several answers in '{name}', judged in '{judged}'), "
            fix = _best_of(row, [str(name), judged], f"b({pairs})", _best(low), where)
            return what + "and lorafit trains on one answer a row", fix
    return None


def _texts_in_list(value: Any) -> tuple[bool, str]:
    """Return (whether a list holds several answers, the field of their texts if they are objects)."""
    if not isinstance(value, list) or len(value) < 2 or speakers_in(value):
        return False, ""
    if all(isinstance(one, str) for one in value):
        return True, ""
    if not all(isinstance(one, dict) for one in value) or ({*ASKS} - {"text", "message"}) & set(value[0]):
        return False, ""
    said = next((name for name in SAID_IN if all(isinstance(one.get(name), str) for one in value)), "")
    return bool(said), said


def _measure(cells: Fields) -> str:
    """Return the field of `cells` that measures an answer; empty if none does."""
    for word in (*MEASURES, *RANKS):
        for name, value in cells.items():
            if word in words_of(str(name)) and _number(value) is not None:
                return str(name)
    return ""


def _are_numbers(value: Any, count: int) -> bool:
    return isinstance(value, list) and len(value) == count and all(_number(one) is not None for one in value if one)


def answer_columns(row: Fields) -> dict[str, str]:
    """Return {mark: column} of the answers side by side in a row; less than two are none."""
    stems: dict[str, dict[str, str]] = {}
    for name, value in row.items():
        if (match := OF_ANSWERS.fullmatch(str(name))) and isinstance(value, str | list | dict):
            stems.setdefault(match["stem"].lower(), {})[match["mark"].lower()] = str(name)
    for name, value in row.items():  # response beside response_2
        marks = stems.get(str(name).lower(), {}) if isinstance(value, str | list | dict) else {}
        if mark := {"2": "1", "b": "a"}.get(min(marks, default=""), ""):
            stems[str(name).lower()] = {mark: str(name), **marks}
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


JUDGED = frozenset(("score", "rating", "reward", "grade", "quality"))
"""Words of columns that may say how good a row's only answer is."""


def keeps_the_good(unused: Sequence[str], where: str) -> str:
    """Return the fix for a column that measures the answers and is not read; empty without one."""
    name = next((name for name in unused if (words := words_of(name)) and words[-1] in JUDGED), "")
    if not name:
        return ""
    line = rewritten(where, "r", f"([q] if float(q.get({name!r}) or 0) >= N else [])")
    return f"rows are learnt whatever '{name}' says; to learn those with N and more: {line}"


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
APPROVING = ({"thumbs", "up"}, {"is", "correct"}, {"answer", "correct"}, {"response", "correct"})
"""Words of columns that say whether an answer is a good one: false beside the first, true beside the second is bad."""


@lru_cache(1024)
def _judging(names: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    """Return (column, the word that calls its answer bad) of those of `names` that judge an answer."""
    found = []
    for name in names:
        words = set(words_of(name)) if isinstance(name, str) else set()
        if words & REFUSED or {"thumbs", "down"} <= words:
            found.append((name, "true"))
        elif words & APPROVED or any(both <= words for both in APPROVING):
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
    if not mark:
        return ""
    if verdict and any(_picks(_word(row[verdict]), other) for other in marks if other != mark):
        return f"{ROW_FLAG} '{verdict}' prefers another answer than '{answer}'"
    beside, low = measures(names, marks)
    numbers = {other: _number(row[name]) for other, name in beside.items()}
    own = numbers.get(mark)
    for other, number in numbers.items():
        if own is not None and number is not None and (number < own if low else number > own):
            return f"{ROW_FLAG} '{beside[other]}' prefers another answer than '{answer}'"
    strength = _signed(row, verdict, {_word(row[verdict])} if verdict else set()) if len(marks) == 2 else ""
    sign = _number(row[strength]) if strength else None
    if sign and (sign > 0) == (mark == marks[0]):
        return f"{ROW_FLAG} '{strength}' prefers another answer than '{answer}'"
    return ""
