"""Names: fields under another spelling of a name that is read, and names that read like a loss flag or a call."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from functools import lru_cache
from typing import Any

Fields = Mapping[str, Any]
WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")
"""A word of a name, as in loss_mask, lossMask and LossMask."""
FLAG_WORDS = frozenset(
    (
        "train", "trained", "training", "trainable", "loss", "losses", "mask", "masks", "masked", "masking", "weight",
        "weights", "supervise", "supervised", "supervision", "learn", "learned", "learnt", "learnable", "kto", "grad",
        "gradient", "backprop",
    )
)  # fmt: skip
NO_FLAG_WORDS = frozenset(("attention", "special"))
"""Words of names that tokenizers give their own masks."""
NO_FLAG_ENDS = frozenset(
    (
        "id", "ids", "idx", "index", "key", "name", "title", "date", "time", "timestamp", "at", "by", "step", "steps",
        "epoch", "epochs", "count", "total", "number", "rate", "ratio", "percent", "score", "value", "version", "model",
        "set", "split", "source", "file", "path", "url", "type", "kind", "unit", "units", "class", "category", "group",
        "reason", "note", "notes", "comment", "run", "data", "size", "kg", "g", "mg", "lb", "lbs", "oz", "grams",
    )
)  # fmt: skip
"""Last words of names that say something else than whether a turn is learnt: training_id, weight_kg, loss_type."""
CALL_WORDS = frozenset(("tool", "tools", "function", "functions", "invocation", "invocations"))


def _plain(name: str) -> str:
    return re.sub(r"[\W_]+", "", name).casefold()


@lru_cache(1024)
def spelling(names: tuple[str, ...], known: frozenset[str]) -> Mapping[str, str]:
    """Return {as the row has it: as it is read} for those of `names` that differ in capitals or underscores only."""
    plain = {_plain(name): name for name in sorted(known)}
    found = {name: plain.get(_plain(name), name) for name in names if isinstance(name, str) and name not in known}
    ours = [one for one in found.values() if one in known]
    return {theirs: one for theirs, one in found.items() if one in known and one not in names and ours.count(one) == 1}


def respelled(fields: Fields, known: frozenset[str]) -> Fields:
    """Return the fields under the names that are read; the same object where every name is spelled so."""
    found = spelling(tuple(fields), known)
    return {found.get(name, name): value for name, value in fields.items()} if found else fields


@lru_cache(1024)
def with_words(names: tuple[str, ...], words: frozenset[str], known: Collection[str]) -> tuple[str, ...]:
    """Return those of `names` that are not known and have one of `words` in them."""
    apart: frozenset[str] = NO_FLAG_ENDS if words is FLAG_WORDS else frozenset()
    texts = [name for name in names if isinstance(name, str) and name not in known]
    return tuple(name for name in texts if words & set(found := words_of(name)) and found[-1] not in apart)


def words_of(name: str) -> list[str]:
    """Return the words of a name in small letters; none for masks that a tokenizer wrote."""
    found = [word.lower() for word in WORD.findall(name)]
    return [] if NO_FLAG_WORDS & set(found) else found
