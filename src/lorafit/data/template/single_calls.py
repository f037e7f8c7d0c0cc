"""Parallel calls one after another, for templates that take one call a turn, as gpt-oss' and Llama 3.1's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lorafit.data.schema.records import CALLS, Record, Turn

Message = dict[str, Any]


def with_calls_apart(record: Record) -> Record:
    """Return the record with one call a turn, each before its result; the same object if no turn has several.

    The rows of `split_answers` are cut between turns, and a cut would part such calls from their results.
    """
    if all(len(turn.calls) < 2 for turn in record.turns):
        return record
    messages, places = one_call_a_turn([turn.message() for turn in record.turns])
    if len(messages) == len(record.turns):
        return record
    flags = [record.turns[place].loss for place in places]
    return replace(record, turns=tuple(_turn(message, loss) for message, loss in zip(messages, flags, strict=True)))


def _turn(message: Message, loss: bool | None) -> Turn:
    extra = {name: value for name, value in message.items() if name not in ("role", "content")}
    is_answer = message["role"] == "assistant"
    return Turn(message["role"], message["content"], extra, loss if is_answer else None)


def one_call_a_turn(messages: Sequence[Message]) -> tuple[list[Message], list[int]]:
    """Return (messages with each of several calls in a turn of its own, before its result; the old place of each).

    Text and reasoning stay with the first call. Calls that have no result each stay together.
    """
    written: list[Message] = []
    places: list[int] = []
    place = 0
    while place < len(messages):
        message = messages[place]
        order = _order_of_results(message, messages, place + 1) if len(message.get(CALLS, ())) > 1 else []
        if not order:
            written.append(message)
            places.append(place)
        for number, result in enumerate(order):
            own = message if not number else {"role": message["role"], "content": ""}
            written += [{**own, CALLS: [message[CALLS][number]]}, messages[result]]
            places += [place, result]
        place += 1 + len(order)
    return written, places


def _order_of_results(message: Message, messages: Sequence[Message], first: int) -> list[int]:
    """Return the place of each call's result, from `first` on; empty if a call has none or a result has no call."""
    end = first
    while end < len(messages) and messages[end].get("role") == "tool":
        end += 1
    if end - first != len(message[CALLS]):
        return []
    by_id = {messages[place].get("tool_call_id"): place for place in range(first, end)}
    ids = [call.get("id") for call in message[CALLS]]
    if None not in ids and len(by_id) == len(ids) and set(ids) == set(by_id):
        return [by_id[one] for one in ids]
    return list(range(first, end))
