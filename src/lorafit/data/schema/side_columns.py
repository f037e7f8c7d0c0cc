"""Columns beside a conversation: loss flags of its turns, its reasoning, and places for columns that are not read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from lorafit.data.schema.fields import LOSS_FLAGS, Fields, from_json, is_empty, kind_of
from lorafit.data.schema.names import CALL_WORDS, FLAG_WORDS, with_words
from lorafit.data.schema.records import REASONING, Record, Turn
from lorafit.data.schema.turns import SPEAKERS, UNCLEAR_FLAGS, is_flag, speaker_of
from lorafit.data.sources.raw_row import Reject, excerpt

FLAG_LISTS = ("weights", *LOSS_FLAGS)
"""Columns that may hold one loss flag for each turn, or for each answer."""
FLAG_COLUMNS = frozenset(FLAG_LISTS)
UNCLEAR_LISTS = ("masks", *UNCLEAR_FLAGS)
LAST_ONLY = "mask_history"
"""LLaMA-Factory's word for rows of which only the last answer is learnt."""
FLAGS_FIX = "write one 0 or 1 for each turn, or for each answer"
ROW_FLAG = "the row's own flag"
WEIGHTS = ("weight", "weights", "loss_weight")
BAD_LABELS = ("false", "bad", "rejected", "undesirable")
YES, NO = ("true", "yes", "1", "1.0"), ("false", "no", "0", "0.0", "none", "")


def list_in(value: Any) -> list[Any] | None:
    """Return a list, also one in a JSON text, as CSV has it; None for any other value."""
    if isinstance(value, str) and value.lstrip()[:1] == "[":
        try:
            value = from_json(value)
        except ValueError:
            return None
    return value if isinstance(value, list) and value else None


def are_flags(value: Any) -> bool:
    """Return True for a list of 0, 1, true and false."""
    flags = list_in(value)
    return flags is not None and is_flag(flags)


def with_flags(turns: list[Turn], row: Fields) -> list[Turn] | Reject:
    """Return the turns with the loss flags that stand in a list beside them."""
    if FLAG_COLUMNS.isdisjoint(row):
        return turns
    for name in FLAG_LISTS:
        flags = list_in(row.get(name))
        if flags is None:
            continue
        if not are_flags(flags):
            return Reject("D012", f"the flags in '{name}' are not all 0, 1, true or false", fix=FLAGS_FIX)
        places = _places(turns, len(flags))
        if not places:
            what = f"'{name}' has {len(flags)} flags for {len(turns)} turns"
            return Reject("D012", what, fix=FLAGS_FIX)
        for place, flag in zip(places, flags, strict=True):
            if turns[place].loss not in (None, bool(flag)):
                what = f"turn {place + 1}: its own loss flag contradicts the one in '{name}'"
                return Reject("D012", what, fix="keep one of the two flags")
            turns[place] = replace(turns[place], loss=bool(flag))
    return turns


def _places(turns: Sequence[Turn], count: int) -> list[int]:
    answers = [place for place, turn in enumerate(turns) if turn.role == "assistant"]
    return next((places for places in (list(range(len(turns))), answers) if len(places) == count), [])


def with_reasoning(turns: list[Turn], reasoning: str) -> list[Turn]:
    """Return the turns with a column's reasoning before the only answer to learn.

    Unchanged if several are learnt, or if the answer has reasoning of its own.
    """
    taught = [place for place, turn in enumerate(turns) if turn.taught]
    if reasoning and len(taught) == 1 and not turns[taught[0]].reasoning:
        answer = turns[taught[0]]
        turns[taught[0]] = replace(answer, extra={**answer.extra, REASONING: reasoning})
    return turns


def last_only(turns: list[Turn], row: Fields) -> list[Turn] | Reject:
    """Return the turns, with all answers but the last kept from the loss if the row says so."""
    if LAST_ONLY not in row:
        return turns
    value = row[LAST_ONLY]
    word = str(value).strip().lower()
    if word in NO:
        return turns
    if word not in YES:
        what = f"the field '{LAST_ONLY}' is {kind_of(value)}, not true or false"
        return Reject("D012", what, fix="write true if only the last answer is to be learnt")
    answers = [place for place, turn in enumerate(turns) if turn.role == "assistant"]
    for place in answers[:-1]:
        turns[place] = replace(turns[place], loss=False)
    return turns


PLACES = {
    "reasoning": re.compile(r"(?i)reason|think|thought|explanation|rationale|justification|(?:^|_)cot(?:_|$)"),
    "system": re.compile(r"(?i)system|persona|preamble|^instructions$|^meta_instruction$|^sys$"),
}
"""Places that a shape may have, and how the names of columns that belong there read."""


def suggested_places(unused: Sequence[str], seen: Iterable[str], mapped: Mapping[str, str]) -> list[str]:
    """Return a `--map` for unused columns whose names say what they hold, one for each free place."""
    taken = {*seen, *mapped}
    found = {
        place: next((name for name in unused if pattern.search(name)), "")
        for place, pattern in PLACES.items()
        if place not in taken
    }
    plain = re.compile(r"[\w.-]+")
    flags = [f"{place}={name}" for place, name in found.items() if name]
    return [f"--map {flag}" if plain.fullmatch(flag.replace("=", "")) else f"--map '{flag}'" for flag in flags]


def row_flag_fault(name: str, value: Any, *, of_turns: bool, labels_judge: bool) -> str:
    """Return the unsupported request of a row's loss flag; empty if the row is learnt as any other.

    `of_turns` says that lists of flags are read, `labels_judge` that a label of 0 means a bad answer.
    """
    if name in UNCLEAR_LISTS:
        says = f"the field '{name}' seems to hold loss flags, and tools do not agree on their sense"
        return says if are_flags(value) else ""
    if list_in(value) is not None:
        flags = are_flags(value) and all(list_in(value) or ())
        return "" if of_turns or flags else f"the loss flags in '{name}' are not read in rows of this shape"
    if is_empty(value):
        return ""
    word = str(value).strip().lower()  # CSV has texts only
    if word in (NO if labels_judge else BAD_LABELS) if name == "label" else word in ("false", "no", "0", "0.0"):
        return f"{ROW_FLAG} '{name}' says that its answer is not to be learnt"
    if name in WEIGHTS and word not in ("none", *YES):
        return f"{ROW_FLAG} '{name}' is neither 0 nor 1, and every row counts the same"
    return ""


SWITCHES = frozenset(
    (
        "on", "off", "true", "false", "yes", "no", "none", "low", "medium", "high", "auto", "enabled", "disabled",
        "0", "1",
    )
)  # fmt: skip
"""Words that some data hold as `reasoning`: they say whether a model thought, and are nothing that it thought."""


def is_switch(value: Any) -> bool:
    """Return True for true, false and words that switch reasoning on or off."""
    return isinstance(value, bool) or (isinstance(value, str) and value.strip().lower() in SWITCHES)


def seeming_fault(row: Fields, known: frozenset[str]) -> str:
    """Return what an unknown column seems to hold, if its name reads like a loss flag or like tools."""
    for name in with_words(tuple(row), FLAG_WORDS, known):
        flags = list_in(row[name])
        keeps = are_flags(flags) and not all(flags) if flags else str(row[name]).strip().lower() == "false"
        if keeps:
            return f"the field '{excerpt(name, 30)}' seems to be a loss flag, and is not read"
    for name in with_words(tuple(row), CALL_WORDS, known):
        if _holds_tools(row[name]):
            return f"the field '{excerpt(name, 30)}' seems to hold tools or calls"
    return ""


def _holds_tools(value: Any) -> bool:
    """Return True for a list of objects that have names, or an object of them."""
    if isinstance(value, dict):
        value = list(value.values())
    return isinstance(value, list) and any(
        isinstance(one, dict) and {"name", "function", "toolName", "toolSpec"} & set(one) for one in value
    )


def is_said(value: Any, record: Record) -> bool:
    """Return True if the record already has a known field's whole content, as a copy of one of its texts."""
    if isinstance(value, dict) and speaker_of(value):
        value = [part for name, part in value.items() if name not in SPEAKERS]
    if isinstance(value, list | dict):
        return all(is_said(part, record) for part in (value.values() if isinstance(value, dict) else value))
    if not isinstance(value, str):
        return False
    wanted = "".join(value.split())
    texts = (record.system or "", *(text for turn in record.turns for text in (turn.content, turn.reasoning)))
    return any(wanted in "".join(text.split()) for text in texts)
