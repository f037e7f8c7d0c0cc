"""Completeness: find the parts of a row that its rendered text lacks, with a twin row of unique marks."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from lorafit.data.schema.records import CALLS, REASONING

Message = Mapping[str, Any]
Outline = tuple[Any, ...]
RunTarget = tuple[int, str]
"""(the message, counted from 0, and which part of it: text, reasoning or call)"""


def outline(messages: Sequence[Message], has_tools: bool, kwargs: Mapping[str, Any]) -> Outline:
    """Return the features of a row, besides its words, that a template can react to."""
    return (
        has_tools,
        json.dumps(kwargs, sort_keys=True, default=str) if kwargs else "",
        *(
            (message["role"], not message.get("content"))
            if len(message) == 2
            else (message["role"], not message.get("content"), *message, len(message.get(CALLS, ())))
            for message in messages
        ),
    )


def twin(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Return the messages with each text, reasoning and call replaced by a unique mark."""
    marked = []
    for place, message in enumerate(messages):
        one = dict(message)
        if one.get("content"):
            one["content"] = _mark(place, "text")
        if REASONING in one:
            one[REASONING] = _mark(place, "reasoning")
        if CALLS in one:
            one[CALLS] = [_marked_call(call, place) for call in one[CALLS]]
        marked.append(one)
    return marked


def _mark(place: int, part: str) -> str:
    return f"Zq{place:04}{part}"


def _marked_call(call: Message, place: int) -> dict[str, Any]:
    mark = _mark(place, "call")
    return {**call, "function": {**call.get("function", {}), "name": mark, "arguments": {mark: mark}}}


def missing_marks(text: str, messages: Sequence[Message]) -> tuple[RunTarget, ...]:
    """Return the marked parts of the twin of `messages` that its rendered text lacks."""
    return tuple(
        (place, part)
        for place, message in enumerate(messages)
        for part in _parts(message)
        if text.count(_mark(place, part)) < (3 * len(message[CALLS]) if part == "call" else 1)
    )


def _parts(message: Message) -> Iterator[str]:
    if message.get("content"):
        yield "text"
    if message.get(REASONING):
        yield "reasoning"
    if message.get(CALLS):
        yield "call"


def missing_words(text: str, messages: Sequence[Message]) -> Iterator[RunTarget]:
    """Yield the parts whose own words the rendered text lacks, blanks aside."""
    cursor, squeezed = 0, ""
    for place, message in enumerate(messages):
        content = message.get("content")
        if isinstance(content, str) and content:
            found = text.find(content, cursor)
            if found >= 0:
                cursor = found + len(content)
            elif content not in text:
                squeezed = squeezed or "".join(text.split())
                if not _stands_in(content, text, squeezed):
                    yield place, "text"
        if len(message) > 2:
            squeezed = squeezed or "".join(text.split())
            reasoning = message.get(REASONING)
            if reasoning and not _stands_in(reasoning, text, squeezed):
                yield place, "reasoning"
            if not all(_call_stands_in(call, text, squeezed) for call in message.get(CALLS, ())):
                yield place, "call"


def _stands_in(content: str, text: str, squeezed: str) -> bool:
    """Return True if the text contains the content: unchanged, as JSON, or word by word.

    Word by word is for templates that remove marks.
    """
    if "".join(content.split()) in squeezed:
        return True
    if any("".join(_escaped(content, ascii_only).split()) in squeezed for ascii_only in (False, True)):
        return True
    return all(word in text for word in content.split())


def _escaped(content: str, ascii_only: bool) -> str:
    return json.dumps(content, ensure_ascii=ascii_only)[1:-1]


def _call_stands_in(call: Message, text: str, squeezed: str) -> bool:
    function = call.get("function", {})
    if function.get("name", "") not in text:
        return False
    return all(_leaf_stands_in(leaf, text, squeezed) for leaf in _leaves(function.get("arguments", {})))


def _leaves(value: Any) -> Iterable[Any]:
    if isinstance(value, Mapping):
        return [leaf for part in value.values() for leaf in _leaves(part)]
    if isinstance(value, list):
        return [leaf for part in value for leaf in _leaves(part)]
    return [value]


def _leaf_stands_in(leaf: Any, text: str, squeezed: str) -> bool:
    if isinstance(leaf, str):
        return leaf in text or _stands_in(leaf, text, squeezed)
    return str(leaf) in text or json.dumps(leaf, default=str) in text
