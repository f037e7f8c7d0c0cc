"""Parallel calls one after another, for templates that take one call a turn, as gpt-oss' and Llama 3.1's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lorafit.data.schema.records import CALLS

Message = dict[str, Any]


def one_call_a_turn(messages: Sequence[Message]) -> tuple[list[Message], list[int]]:
    """Return (messages with each of several calls in a turn of its own, before its result; the old place of each).

    Text and reasoning stay with the first call. Calls that have no result each stay together.
    """
    written: list[Message] = []
    places: list[int] = []
    place = 0
    while place < len(messages):
        message, results = messages[place], _results_after(messages, place)
        turns = _apart(message, results) if len(message.get(CALLS, ())) > 1 else None
        if turns is None:
            turns, results = [message], []
        written += turns
        places += [place if turn.get("role") == "assistant" else place + 1 for turn in turns]
        place += 1 + len(results)
    return written, places


def _results_after(messages: Sequence[Message], place: int) -> list[Message]:
    end = place + 1
    while end < len(messages) and messages[end].get("role") == "tool":
        end += 1
    return list(messages[place + 1 : end])


def _apart(message: Message, results: list[Message]) -> list[Message] | None:
    """Return each call with its result; None if a call has none or a result belongs to no call."""
    calls = message[CALLS]
    if len(results) != len(calls):
        return None
    by_id = {result.get("tool_call_id"): result for result in results}
    ids = [call.get("id") for call in calls]
    if None not in ids and len(by_id) == len(results) and set(ids) == set(by_id):
        results = [by_id[one] for one in ids]
    turns: list[Message] = []
    for number, (call, result) in enumerate(zip(calls, results, strict=True)):
        own = message if not number else {"role": message["role"], "content": ""}
        turns += [{**own, CALLS: [call]}, result]
    return turns
