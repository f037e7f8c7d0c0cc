"""Loss masks: spans of characters become spans of tokens.

A token is supervised when it begins inside a span. So a token that covers the prompt's end together with the
answer's start is not supervised: no prompt character ever is. A token that begins in the span and reaches
beyond it is supervised only when it is a stop token (those may swallow the blanks that follow them).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tokenizers import Encoding

from lorafit.data.template_row import Span


def token_mask(
    encoding: Encoding, text: str, spans: Iterable[Span], enders: frozenset[int]
) -> tuple[list[int], list[bool], bool, bool]:
    """(ids, mask, straddled, stopped) of one row, ids and mask of shape (tokens,).

    `straddled`: a token covers the edge of a span. `stopped`: every span ends with one of `enders`.
    """
    ids: list[int] = encoding.ids
    mask = [False] * len(ids)
    straddled, stopped = False, True
    for start, end in spans:
        first, begins_before = _first_from(encoding, start, len(text), len(ids))
        last, reaches_beyond = _first_from(encoding, end, len(text), len(ids))
        if reaches_beyond and ids[last - 1] not in enders:
            last -= 1
            straddled = True
        straddled |= begins_before
        if last > first:
            mask[first:last] = [True] * (last - first)
        stopped &= last > first and ids[last - 1] in enders
    return ids, mask, straddled, stopped


def _first_from(encoding: Encoding, place: int, characters: int, count: int) -> tuple[int, bool]:
    """(the first token that begins at or after character `place`, whether the one before it covers `place`)."""
    if place >= characters:
        return count, False
    token = encoding.char_to_token(place)
    if token is None:
        return _searched(encoding.offsets, place), False
    if _start(encoding, token) >= place:
        return token, False
    while token < count and _start(encoding, token) < place:
        token += 1
    return token, True


def _start(encoding: Encoding, token: int) -> int:
    found: tuple[int, int] | None = encoding.token_to_chars(token)
    assert found is not None, "every token of a single text has a place in it"
    return found[0]


def _searched(offsets: Sequence[Span], place: int) -> int:
    # the tokenizer's normaliser removed the character at `place`, so no token covers it
    return next((token for token, (start, _) in enumerate(offsets) if start >= place), len(offsets))
