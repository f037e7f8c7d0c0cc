"""scores: compare one answer with the response that is wanted."""

from __future__ import annotations

import json
import string
import unicodedata
from collections import Counter
from collections.abc import Mapping
from typing import Any

EXACT_MATCH, TOKEN_F1 = "exact_match", "token_f1"
JSON_VALID, JSON_EQUAL, JSON_FIELDS = "json_valid", "json_equal", "json_fields"
ARTICLES = frozenset({"a", "an", "the"})
PUNCTUATION = frozenset(string.punctuation)


def exact_match(expected: str, answer: str) -> float:
    """Return 1 if both texts are equal, blanks at both ends aside; else 0."""
    return float(expected.strip() == answer.strip())


def token_f1(expected: str, answer: str) -> float:
    """Return the F1 of the words that both texts share, 0 to 1.

    Words are compared as SQuAD's evaluation does: in lower case, without punctuation and English articles.
    """
    wanted, given = _words(expected), _words(answer)
    if not wanted or not given:
        return float(wanted == given)
    shared = sum((Counter(wanted) & Counter(given)).values())
    return 2 * shared / (len(wanted) + len(given))


def json_scores(expected: Any, answer: str) -> dict[str, float]:
    """Return whether `answer` is JSON, whether it equals `expected`, and the share of fields that are right.

    `expected` is the parsed response. Fields are the leaves of objects and lists, each at its path. A field that is
    missing counts as wrong, and so does one too many: the share is over the fields of both.
    """
    try:
        given = json.loads(answer)
    except (ValueError, RecursionError):
        return {JSON_VALID: 0.0, JSON_EQUAL: 0.0, JSON_FIELDS: 0.0}
    wanted_fields, given_fields = _fields(expected), _fields(given)
    paths = wanted_fields.keys() | given_fields.keys()
    right = sum(
        path in given_fields and path in wanted_fields and wanted_fields[path] == given_fields[path] for path in paths
    )
    return {JSON_VALID: 1.0, JSON_EQUAL: float(right == len(paths)), JSON_FIELDS: right / len(paths) if paths else 1.0}


def as_json(text: str) -> Any:
    """Return the object or list that `text` is as JSON, or None."""
    if not text.strip().startswith(("{", "[")):
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _words(text: str) -> list[str]:
    folded = unicodedata.normalize("NFC", text).lower()
    return [word for word in "".join(c for c in folded if c not in PUNCTUATION).split() if word not in ARTICLES]


def _fields(value: Any) -> dict[tuple[Any, ...], tuple[str, Any]]:
    """Return path -> (kind, value) of every leaf; an empty object or list is a leaf."""
    found: dict[tuple[Any, ...], tuple[str, Any]] = {}
    waiting: list[tuple[tuple[Any, ...], Any]] = [((), value)]
    while waiting:
        path, here = waiting.pop()
        if isinstance(here, Mapping) and here:
            waiting += [((*path, key), each) for key, each in here.items()]
        elif isinstance(here, list) and here:
            waiting += [((*path, place), each) for place, each in enumerate(here)]
        else:
            found[path] = _leaf(here)
    return found


def _leaf(value: Any) -> tuple[str, Any]:
    """Return (kind, value), so that true is not 1; 1 and 1.0 are one number, as JSON has it."""
    if isinstance(value, bool) or value is None:
        return "word", value
    if isinstance(value, int | float):
        return "number", value
    return type(value).__name__, str(value)
