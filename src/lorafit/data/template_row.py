"""One row on its way through a template: cleaned messages in, text with its supervised spans out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorafit.data.records import Record

MAX_ROW_CHARACTERS = 4 << 20
"""Rows with more text are never rendered: four million characters exceed every context there is."""

Message = dict[str, Any]
Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class LaidOut:
    """A row's text and its supervised spans [start, end) in characters; `problems` as in template_problems.py."""

    text: str
    spans: tuple[Span, ...] = ()
    problems: tuple[str, ...] = ()
    detail: str = ""


def cleaned(messages: Iterable[Mapping[str, Any]]) -> list[Message]:
    """The messages with every newline as "\\n" and trailing white space stripped, None-valued keys left out.

    The one place where contents are changed: training and serving both pass through it, and twice is as once.
    """
    return [
        {key: _clean(value) if key == "content" else value for key, value in message.items() if value is not None}
        for message in messages
    ]


def _clean(content: Any) -> Any:
    return content.replace("\r\n", "\n").replace("\r", "\n").rstrip() if isinstance(content, str) else content


def messages_of(record: Record) -> list[Message]:
    """The record's cleaned messages up to its last answer; what follows it can teach nothing."""
    messages = cleaned(record.messages())
    last = max(answers_in(messages), default=len(messages) - 1)
    return messages[: last + 1]


def answers_in(messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """Where the assistant speaks."""
    return [place for place, message in enumerate(messages) if message.get("role") == "assistant"]


def characters_in(messages: Iterable[Mapping[str, Any]]) -> int:
    """How much text the messages hold."""
    return sum(len(content) for message in messages if isinstance(content := message.get("content"), str))
