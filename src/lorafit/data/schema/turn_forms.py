"""Turn forms: lists of turns as tables, pairs and JSON texts hold them, and messages inside LangChain's objects."""

from __future__ import annotations

from typing import Any

from lorafit.data.schema.fields import Fields, from_json, is_empty

SPEAKER_FIELDS = ("role", "from")


def turns_of(value: Any) -> Any:
    """Return the list of messages that a field holds, in any of its forms. Other values are returned unchanged.

    Raises ValueError for a text that is not JSON.
    """
    value = from_json(from_json(value))
    if isinstance(value, dict):
        return _rows_of(value)
    if not isinstance(value, list) or not value:
        return value
    if len(value) == 1 and isinstance(value[0], list) and value[0] and isinstance(value[0][0], dict):
        return value[0]
    if all(isinstance(one, str) and one.lstrip()[:1] == "{" for one in value):
        return [from_json(one) for one in value]
    if all(isinstance(one, list) and len(one) == 2 and isinstance(one[0], str) for one in value):
        return [{"role": role, "content": content} for role, content in value] if _alternates(value) else value
    return value


def _alternates(pairs: list[list[Any]]) -> bool:
    """Return True if the first of each pair is a role, and not a question."""
    return all(one[0].strip().lower() in PAIRED for one in pairs)


PAIRED = frozenset(
    ("system", "developer", "user", "human", "assistant", "ai", "gpt", "model", "bot", "chatbot", "tool", "function")
)
"""Roles that stand first in a pair of role and text, as LangChain's tuples."""


def _rows_of(table: dict[str, Any]) -> Any:
    """Return the rows of a table by columns, as `datasets` writes a sequence of features."""
    columns = list(table.values())
    if not set(SPEAKER_FIELDS) & set(table) or not all(isinstance(column, list) for column in columns):
        return table
    if len({len(column) for column in columns}) != 1:
        return table
    return [dict(zip(table, cells)) for cells in zip(*columns)]


KINDS = {
    "HumanMessage": "human", "AIMessage": "ai", "SystemMessage": "system", "ToolMessage": "tool",
    "FunctionMessage": "function", "HumanMessageChunk": "human", "AIMessageChunk": "ai",
}  # fmt: skip
BESIDE = ("tool_calls", "function_call", "reasoning_content", "refusal")
"""What LangChain keeps among the `additional_kwargs` of a message."""


def unwrapped(message: Fields) -> Fields:
    """Return the message inside LangChain's two forms of one, with what stands in its `additional_kwargs`."""
    inner, kind = message.get("data"), message.get("type")
    if isinstance(message.get("kwargs"), dict) and isinstance(message.get("id"), list):
        inner, kind = message["kwargs"], KINDS.get(str(message["id"][-1]))
    if isinstance(inner, dict) and isinstance(kind, str) and "content" in inner:
        message = {**inner, "type": kind}
    beside = message.get("additional_kwargs")
    if isinstance(beside, dict):
        more = {name: beside[name] for name in BESIDE if not is_empty(beside.get(name)) and is_empty(message.get(name))}
        left = {name: value for name, value in beside.items() if name not in BESIDE and not is_empty(value)}
        kept = {name: value for name, value in message.items() if name != "additional_kwargs"}
        message = {**kept, **more, **({"additional_kwargs": left} if left else {})}
    return message
