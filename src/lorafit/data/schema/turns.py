"""One message of a conversation as a Turn, in the spelling of OpenAI, ShareGPT or Gemini."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from lorafit.data.schema.fields import FLAG_NAMES, Fields, kind_of, loss_flag, read_calls, text_fault
from lorafit.data.schema.records import CALLS, REASONING, Turn
from lorafit.data.sources.raw_row import Reject, excerpt

CALL = "call"
ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "bot": "assistant",
    "ai": "assistant", "chatbot": "assistant",
    "tool": "tool", "function": "tool", "observation": "tool", "ipython": "tool", "tool_response": "tool",
    "tool_result": "tool", "tool_results": "tool", "function_response": "tool",
    "function_call": CALL, "tool_call": CALL, "tool_calls": CALL,
}  # fmt: skip
"""Every name of a role that is read, and what it means."""
REASONING_NAMES = ("reasoning_content", "reasoning", "thinking")
CONTENT_NAMES = ("content", "value", "parts", "text")
READ = frozenset(("role", "from", "tool_calls", "function_call", *CONTENT_NAMES, *REASONING_NAMES, *FLAG_NAMES))
TEXT_PARTS = ("text", "input_text", "output_text")


def read_turn(message: Any) -> Turn | Reject:
    """The turn that `message` spells."""
    if not isinstance(message, dict):
        return Reject("D012", f"is {kind_of(message)}, not an object with role and content", fix=SHAPE_FIX)
    speaker = message.get("role", message.get("from"))
    role = ROLES.get(speaker) or ROLES.get(speaker.lower()) if isinstance(speaker, str) else None
    if role is None:
        known = ", ".join(sorted(ROLES))
        return Reject("D012", f"the role '{excerpt(str(speaker))}' is none of {known}", fix="use one of those roles")
    content = message.get("content")
    if isinstance(content, str) and len(message) == 2 and role != CALL:
        return Turn(role, content)
    return _called(message) if role == CALL else _full(role, message)


SHAPE_FIX = 'write {"role": "user", "content": "…"}'
IMAGE_FIX = "take it out, or leave such rows out with --on-bad drop"


def _full(role: str, message: Fields) -> Turn | Reject:
    loss = loss_flag(message)
    extra = {name: value for name, value in message.items() if name not in READ and value is not None}
    reasoned = _reasoning(message) if role == "assistant" else ""
    calls = _calls(role, message)
    for part in (loss, reasoned, calls):
        if isinstance(part, Reject):
            return part
    content = _content(role, message, bool(calls) or bool(reasoned))
    if isinstance(content, Reject):
        return content
    text, in_parts = content
    if thought := "\n".join(part for part in (reasoned, in_parts) if isinstance(part, str) and part):
        extra[REASONING] = thought
    if calls:
        extra[CALLS] = calls
    return Turn(role, text, extra, loss if isinstance(loss, bool) else None)


def _called(message: Fields) -> Turn | Reject:
    """ShareGPT's turn of function_call: the text is the call in JSON."""
    loss, text = loss_flag(message), _content("assistant", message, False)
    if isinstance(loss, Reject):
        return loss
    if isinstance(text, Reject):
        return text
    calls = read_calls(text[0], "function_call")
    return calls if isinstance(calls, Reject) else Turn("assistant", "", {CALLS: calls}, loss)


def _calls(role: str, message: Fields) -> list[Fields] | Reject:
    found: list[Fields] = []
    for name in ("tool_calls", "function_call"):
        if not message.get(name):
            continue
        if role != "assistant":
            return Reject("D012", f"'{name}' stands in a turn of the {role}", fix="only the assistant calls tools")
        calls = read_calls(message[name], name)
        if isinstance(calls, Reject):
            return calls
        found += calls
    return found


def _reasoning(message: Fields) -> str | Reject:
    """The answer's reasoning under any of its names."""
    found = ""
    for name in REASONING_NAMES:
        value = message.get(name)
        if value is None or value == "":
            continue
        if not isinstance(value, str):
            return Reject("D012", f"the field '{name}' is {kind_of(value)}, not text")
        if found and found != value:
            return Reject(
                "D012", f"the turn has two texts of reasoning, one of them in '{name}'", fix="keep one of them"
            )
        found = value
    return found


def _content(role: str, message: Fields, may_lack: bool) -> tuple[str, str] | Reject:
    """(text, reasoning among its parts) of a turn; a list of text parts counts as one text."""
    name = next((each for each in CONTENT_NAMES if message.get(each) is not None), "")
    value = message.get(name)
    if any(message.get(other) not in (None, "", value) for other in CONTENT_NAMES if other != name):
        return Reject("D012", f"the turn has a text in '{name}' and another one beside it", fix="keep one of the two")
    if isinstance(value, str):
        return value, ""
    if isinstance(value, list) and not (role == "tool" and not _are_parts(value)):
        return _joined(value)
    if role == "tool" and value is not None:
        return json.dumps(value, ensure_ascii=False), ""  # what a tool returned is JSON, and becomes its text
    if value is None and may_lack:
        return "", ""
    return text_fault(message, name or ("value" if "from" in message else "content")) or ("", "")


def _are_parts(value: list[Any]) -> bool:
    return bool(value) and all(isinstance(part, dict) and ("text" in part or "type" in part) for part in value)


def _joined(parts: Iterable[Any]) -> tuple[str, str] | Reject:
    texts, thoughts = [], []
    for part in parts:
        kind = part.get("type", "text") if isinstance(part, dict) else ""
        if kind in ("thinking", "reasoning") and isinstance(thought := part.get(kind, part.get("text")), str):
            thoughts.append(thought)
            continue
        text = part.get("text") if kind in TEXT_PARTS else part
        if not isinstance(text, str):
            return Reject("D012", "the content holds something that is not text (an image?)", fix=IMAGE_FIX)
        texts.append(text)
    return "".join(texts), "\n".join(thoughts)
