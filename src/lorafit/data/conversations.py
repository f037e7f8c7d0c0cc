"""Conversations cut at their turns: after the last answer, and, with `--long split-turns`, into examples that fit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

from lorafit.data.records import Record

Row = TypeVar("Row")


def up_to_last_answer(record: Record) -> Record:
    """The record without the turns after its last answer: nothing in them is learnt."""
    last = max(place for place, turn in enumerate(record.turns) if turn.role == "assistant")
    return record if last == len(record.turns) - 1 else replace(record, turns=record.turns[: last + 1])


def split_at_turns(
    record: Record, encode: Callable[[Sequence[Record]], Sequence[Row]], fits: Callable[[Row], bool]
) -> tuple[list[tuple[Record, Row]], int]:
    """(pieces that fit, each with its encoding; exchanges that do not fit even alone).

    A piece begins with a user turn, keeps the system text and the tools, and takes as many whole exchanges as fit.
    Every exchange stands in at most one piece, without the turns before the piece.
    """
    begins = [place for place, turn in enumerate(record.turns) if turn.role == "user" or place == 0]
    ends = [*begins[1:], len(record.turns)]
    pieces: list[tuple[Record, Row]] = []
    too_long = first = 0
    while first < len(begins):
        longer = [replace(record, turns=record.turns[begins[first] : end]) for end in ends[first:]]
        answered = [piece for piece in longer if any(turn.role == "assistant" for turn in piece.turns)]
        encoded = encode(answered)
        fitting = [(piece, row) for piece, row in zip(answered, encoded, strict=True) if fits(row)]
        if not fitting:
            too_long += bool(answered)
            first += 1
            continue
        pieces.append(fitting[-1])
        first = ends.index(begins[first] + len(fitting[-1][0].turns)) + 1
    return pieces, too_long
