"""Record: one training example, of any file and row shape, and the places where a long one is cut."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

REASONING, CALLS = "reasoning_content", "tool_calls"
"""Under which names `Turn.extra` holds an answer's reasoning and its calls, whatever the row called them."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a conversation.

    Attributes:
        role: system, user, assistant, tool, or document (a text without a conversation around it).
        content: its text.
        extra: reasoning (REASONING), parsed tool calls (CALLS), `name`, `tool_call_id`, and fields for the template.
        loss: the row's own flag; None where the row has none. Only answers are ever taught.
    """

    role: str
    content: str
    extra: Mapping[str, Any] = field(default_factory=dict)
    loss: bool | None = None

    @property
    def taught(self) -> bool:
        """Whether the turn is an answer to learn."""
        return self.role == "assistant" and self.loss is not False

    @property
    def reasoning(self) -> str:
        """The reasoning before the answer; empty without any."""
        return str(self.extra.get(REASONING, ""))

    @property
    def calls(self) -> Sequence[Mapping[str, Any]]:
        """The tool calls, each as {"type": "function", "function": {"name": …, "arguments": {…}}}."""
        found: Sequence[Mapping[str, Any]] = self.extra.get(CALLS, ())
        return found

    def message(self) -> dict[str, Any]:
        """Return the turn as chat templates and OpenAI clients write it."""
        return {"role": self.role, "content": self.content, **self.extra}


DOCUMENT = "document"


@dataclass(frozen=True, slots=True)
class Record:
    """One training example.

    Attributes:
        turns: the turns after the system text.
        source: where the row stands, `file:line`.
        system: the system text.
        tools: tool schemas, each as {"type": "function", "function": {…}}.
        template_kwargs: variables that the row sets for the chat template, as `enable_thinking`.
        unread: names of the system turn's further fields, which have no place here.
    """

    turns: tuple[Turn, ...]
    source: str
    system: str | None = None
    tools: tuple[Mapping[str, Any], ...] = ()
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    unread: tuple[str, ...] = field(default=(), compare=False)

    @classmethod
    def from_messages(
        cls,
        messages: Sequence[Mapping[str, Any]],
        source: str,
        tools: Sequence[Mapping[str, Any]] = (),
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> Record:
        """Return the record whose `messages()` are these."""
        named = ("role", "content")
        turns = [
            Turn(one["role"], one["content"], {key: value for key, value in one.items() if key not in named})
            for one in messages
        ]
        system = turns.pop(0).content if turns[0].role == "system" else None
        return cls(tuple(turns), source, system, tuple(tools), template_kwargs or {})

    def messages(self) -> list[dict[str, Any]]:
        """Return every turn, system first, as a list of messages."""
        head = [{"role": "system", "content": self.system}] if self.system else []
        return head + [turn.message() for turn in self.turns]

    @property
    def is_document(self) -> bool:
        """Whether the record is one text of which every token is taught."""
        return self.turns[0].role == DOCUMENT

    @property
    def taught_places(self) -> list[int]:
        """Return the indices in `messages()` of the answers to learn."""
        first = 1 if self.system else 0
        return [place for place, turn in enumerate(self.turns, first) if turn.taught]

    @property
    def prompt(self) -> list[dict[str, Any]]:
        """Return the messages before the last assistant turn."""
        return self.messages()[:-1]

    @property
    def response(self) -> str:
        """Return the text of the last assistant turn."""
        return self.turns[-1].content


Row = TypeVar("Row")


def up_to_last_answer(record: Record) -> Record:
    """Return the record without the turns after its last taught answer, which teach nothing.

    A record without a taught answer stays whole.
    """
    turns = record.turns
    last = next((place for place in range(len(turns) - 1, -1, -1) if turns[place].taught), len(turns) - 1)
    return record if last == len(turns) - 1 else replace(record, turns=turns[: last + 1])


def each_answer_alone(record: Record) -> list[Record]:
    """Return one record for each taught answer, ending in it, with the turns before it as context."""
    places = [place for place, turn in enumerate(record.turns) if turn.taught and (place or record.system)]
    if len(places) < 2:
        return [record]
    context = [replace(turn, loss=False) if turn.role == "assistant" else turn for turn in record.turns]
    return [replace(record, turns=(*context[:place], record.turns[place])) for place in places]


def split_at_turns(
    record: Record, encode: Callable[[Sequence[Record]], Sequence[Row]], fits: Callable[[Row], bool]
) -> tuple[list[tuple[Record, Row]], int]:
    """Return (pieces that fit, each with its encoding; the number of exchanges that do not fit even alone).

    A piece begins with a user turn, keeps the system text and the tools, and takes as many whole exchanges as fit.
    Every exchange stands in at most one piece, without the turns before the piece.
    """
    begins = [place for place, turn in enumerate(record.turns) if turn.role == "user" or place == 0]
    ends = [*begins[1:], len(record.turns)]
    pieces: list[tuple[Record, Row]] = []
    too_long = first = 0
    while first < len(begins):
        longer = [replace(record, turns=record.turns[begins[first] : end]) for end in ends[first:]]
        answered = [up_to_last_answer(piece) for piece in longer if any(turn.taught for turn in piece.turns)]
        encoded = encode(answered)
        fitting = [(piece, row) for piece, row in zip(answered, encoded, strict=True) if fits(row)]
        if not fitting:
            too_long += bool(answered)
            first += 1
            continue
        pieces.append(fitting[-1])
        first = next(place for place, end in enumerate(ends) if end >= begins[first] + len(fitting[-1][0].turns)) + 1
    return pieces, too_long
