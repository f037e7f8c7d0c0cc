"""Ids of tool calls for templates that take only ids of nine letters and digits, as Mistral's."""

from __future__ import annotations

import hashlib
import re
import string
from collections import deque
from collections.abc import Sequence
from typing import Any

from lorafit.data.schema.records import CALLS

LENGTH = 9
FITTING = re.compile(r"[A-Za-z0-9]{9}")
DIGITS = string.digits + string.ascii_letters


def with_short_ids(messages: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], bool]:
    """Return (the messages with an id of nine letters and digits in each call and its result, whether one was made).

    A longer id keeps its last nine characters, as vLLM's Mistral tokenizer cuts it; any other is hashed. A call
    without an id gets one of its place, and results without an id answer the calls before them in their order.
    """
    ids = _Ids()
    written = []
    for place, message in enumerate(messages):
        if CALLS in message:
            calls = [{**call, "id": ids.of_call(call, f"{place}.{at}")} for at, call in enumerate(message[CALLS])]
            message = {**message, CALLS: calls}
        elif message.get("role") == "tool":
            message = {**message, "tool_call_id": ids.of_result(message, f"{place}")}
        written.append(message)
    return written, ids.made


class _Ids:
    """The short ids of one conversation."""

    def __init__(self) -> None:
        self.made = False
        self._known: dict[str, str] = {}
        self._waiting: deque[str] = deque()

    def of_call(self, call: dict[str, Any], place: str) -> str:
        given = call.get("id")
        short = self._short(place if given is None else str(given))
        self._waiting.append(short)
        return short

    def of_result(self, message: dict[str, Any], place: str) -> str:
        given = message.get("tool_call_id")
        if given is None:
            self.made = True
            return self._waiting.popleft() if self._waiting else self._short(place)
        short = self._short(str(given))
        if short in self._waiting:
            self._waiting.remove(short)
        return short

    def _short(self, given: str) -> str:
        if given in self._known:
            return self._known[given]
        short = given if FITTING.fullmatch(given) else given[-LENGTH:]
        if not FITTING.fullmatch(short) or short in self._known.values():
            short = _hashed(given)
        self.made |= short != given
        self._known[given] = short
        return short


def _hashed(given: str) -> str:
    number = int.from_bytes(hashlib.blake2b(given.encode("utf-8", "surrogatepass"), digest_size=8).digest())
    return "".join(DIGITS[number // len(DIGITS) ** place % len(DIGITS)] for place in range(LENGTH))
