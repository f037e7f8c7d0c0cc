"""Record: one training example, whatever file and row shape it came from; and where a long one is cut."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a conversation. `extra` keeps what only a chat template understands (tool_calls, name)."""

    role: str
    content: str
    extra: Mapping[str, Any] = field(default_factory=dict)

    def message(self) -> dict[str, Any]:
        """The turn as chat templates and OpenAI clients write it."""
        return {"role": self.role, "content": self.content, **self.extra}


@dataclass(frozen=True, slots=True)
class Record:
    """A system text, the turns after it, and where the row stands (`file:line`)."""

    turns: tuple[Turn, ...]
    source: str
    system: str | None = None
    tools: tuple[Mapping[str, Any], ...] = ()

    def messages(self) -> list[dict[str, Any]]:
        """Every turn, system first, as a list of messages."""
        head = [{"role": "system", "content": self.system}] if self.system else []
        return head + [turn.message() for turn in self.turns]

    @property
    def prompt(self) -> list[dict[str, Any]]:
        """The messages before the last assistant turn: what the model is asked."""
        return self.messages()[:-1]

    @property
    def response(self) -> str:
        """The last assistant turn: what the model should answer."""
        return self.turns[-1].content


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
