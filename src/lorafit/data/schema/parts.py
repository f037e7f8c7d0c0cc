"""Content parts of a message: texts, reasoning, calls and results, as OpenAI, Anthropic, Bedrock and Gemini write."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from lorafit.data.schema.fields import Fields, is_empty, kind_of, read_calls
from lorafit.data.schema.records import Turn
from lorafit.data.sources.raw_row import Reject, excerpt

TEXT_PARTS = frozenset(("text", "input_text", "output_text", "refusal"))
THOUGHT_PARTS = frozenset(("thinking", "reasoning", "reasoningContent"))
CALL_PARTS = ("tool_use", "server_tool_use", "tool_call", "function_call", "tool-call")
RESULT_PARTS = ("tool_result", "function_call_output", "tool-result")
MEDIA_PARTS = ("image", "image_url", "input_image", "audio", "input_audio", "video", "file", "inlineData", "media")
CALLS_WITHIN = ("functionCall", "function_call", "toolUse", "toolCall")
"""Members under which Gemini's and Bedrock's parts hold a call."""
RESULTS_WITHIN = ("functionResponse", "function_response", "toolResult")
BESIDE_TEXT = frozenset(
    (
        "type", "text", "refusal", "thinking", "reasoning", "thought", "signature", "thoughtSignature",
        "thought_signature", "cache_control", "cachePoint", "citations", "annotations", "logprobs", "index", "id",
        "content", "closed", "reasoningContent", "state", "providerOptions", "providerMetadata",
    )
)  # fmt: skip
"""Members of a text part that say nothing that is taught."""
IMAGE_FIX = "take it out, or leave such rows out with --on-bad drop"


@dataclass(slots=True)
class Parts:
    """The content of one message, by kind.

    Attributes:
        text: its text parts, joined.
        reasoning: its thinking parts, one a line.
        calls: its tool calls, in the form of `Turn.calls`.
        results: the tool turns that stand in it.
        beside: what its text parts hold beside their text, as sources of a citation.
    """

    text: str = ""
    reasoning: str = ""
    calls: list[Fields] = field(default_factory=list)
    results: list[Turn] = field(default_factory=list)
    beside: dict[str, Any] = field(default_factory=dict)


def read_parts(parts: Iterable[Any]) -> Parts | Reject:
    """Return the texts, calls and results of a list of parts."""
    parts = list(parts)
    found = Parts()
    texts: list[str] = []
    thoughts: list[str] = []
    for part in parts:
        kind = _kind_of(part)
        if kind in TEXT_PARTS or kind in THOUGHT_PARTS:
            text = _text_of(part, kind)
            if isinstance(text, Reject):
                return text
            (thoughts if kind in THOUGHT_PARTS or _is_thought(part) else texts).append(text)
            if isinstance(part, dict):
                found.beside |= {name: part[name] for name in SOURCES if not is_empty(part.get(name))}
        elif kind == "call":
            calls = _calls_of(part)
            if isinstance(calls, Reject):
                return calls
            found.calls += calls
        elif kind == "result":
            result = _result_of(part)
            if isinstance(result, Reject):
                return result
            found.results.append(result)
        else:
            return _no_text(kind)
    # texts without an object around them are paragraphs, and parts of one text are not
    joint = "\n" if len(texts) > 1 and all(isinstance(part, str) for part in parts) else ""
    found.text, found.reasoning = joint.join(texts), "\n".join(thoughts)
    return found


SOURCES = ("citations", "annotations")


def holds_media(value: Sequence[Any]) -> bool:
    """Return True if one of the elements is an image, a sound or a file."""
    return any(isinstance(part, dict) and _kind_of(part) in MEDIA_PARTS for part in value)


def text_object(value: Fields) -> list[Any]:
    """Return the parts of a content that is one object: ChatGPT's export, or a single part; empty for others."""
    if isinstance(value.get("parts"), list):
        return list(value["parts"])
    return [value] if _kind_of(value) in KINDS else []


def system_text(value: Any) -> str | None:
    """Return the text of a system field: a list of text parts (Anthropic, Bedrock) or an object of them (Gemini).

    None for anything else.
    """
    if isinstance(value, dict):
        value = next((value[name] for name in ("parts", "content", "text") if value.get(name) is not None), None)
    if not isinstance(value, list):
        return value if isinstance(value, str) else None
    read = read_parts(value)
    return read.text if isinstance(read, Parts) and not read.calls and not read.results else None


def are_parts(value: Sequence[Any]) -> bool:
    """Return True if every element is a content part."""
    return bool(value) and all(isinstance(part, dict) and _kind_of(part) in KINDS for part in value)


KINDS = TEXT_PARTS | THOUGHT_PARTS | {"call", "result"}


def _kind_of(part: Any) -> str:
    """Return text, thinking, call or result; for anything else its own type."""
    if isinstance(part, str):
        return "text"
    if not isinstance(part, dict):
        return kind_of(part)
    kind = part.get("type")
    if kind in CALL_PARTS or _member(part, CALLS_WITHIN):
        return "call"
    if kind in RESULT_PARTS or _member(part, RESULTS_WITHIN):
        return "result"
    if kind is None and isinstance(part.get("reasoningContent"), dict):
        return "reasoningContent"
    if isinstance(kind, str):
        return kind
    return "text" if isinstance(part.get("text"), str) else next((str(name) for name in part), "an empty object")


def _member(part: Fields, names: Sequence[str]) -> str:
    return next((name for name in names if isinstance(part.get(name), dict)), "")


def _is_thought(part: Any) -> bool:
    return isinstance(part, dict) and part.get("thought") is True


def _text_of(part: Any, kind: str) -> str | Reject:
    if isinstance(part, str):
        return part
    more = [name for name, value in part.items() if name not in BESIDE_TEXT and not is_empty(value)]
    if more:
        return _no_text(str(more[0]))
    text = next((part[name] for name in (kind, "text", "content") if part.get(name) is not None), None)
    if isinstance(text, dict):  # OpenAI's Assistants, and Bedrock's reasoning
        text = text.get("reasoningText", text)
        text = next((text[name] for name in ("value", "text") if text.get(name) is not None), None)
    elif isinstance(text, list) and kind in THOUGHT_PARTS:  # Mistral's
        inner = read_parts(text)
        text = inner if isinstance(inner, Reject) else inner.text
    return text if isinstance(text, str | Reject) else _no_text(kind)


def _no_text(kind: str) -> Reject:
    what = f"the content holds something that is not text ('{excerpt(kind, 30)}')"
    return Reject("D012", what, fix=IMAGE_FIX)


def _calls_of(part: Fields) -> list[Fields] | Reject:
    within = _member(part, CALLS_WITHIN)
    call = part[within] if within else {name: value for name, value in part.items() if name != "type"}
    identity = next((call[name] for name in ("id", "toolUseId", "toolCallId") if call.get(name)), part.get("id"))
    plain = {name: value for name, value in call.items() if name not in NOT_OF_A_CALL}
    return read_calls({**plain, **({"id": identity} if identity else {})}, within or str(part.get("type")))


NOT_OF_A_CALL = ("id", "toolUseId", "toolCallId", "cache_control", "providerOptions", "caller")


def _result_of(part: Fields) -> Turn | Reject:
    within = _member(part, RESULTS_WITHIN)
    result = part[within] if within else part
    identity = next((result[name] for name in RESULT_IDS if result.get(name)), None)
    value = next((result[name] for name in RESULT_TEXTS if result.get(name) is not None), "")
    text = _result_text(value)
    if isinstance(text, Reject):
        return text
    extra = {"tool_call_id": identity} if identity else {}
    if isinstance(name := result.get("name", result.get("toolName")), str):
        extra["name"] = name
    if result.get("is_error") or result.get("status") == "error":
        extra["is_error"] = True
    return Turn("tool", text, extra)


RESULT_TEXTS = ("content", "response", "output", "result")
RESULT_IDS = ("tool_use_id", "toolUseId", "toolCallId", "call_id", "id")


def _result_text(value: Any) -> str | Reject:
    """Return a tool's result as text: texts unchanged, values as JSON."""
    if isinstance(value, list) and value and all(isinstance(one, dict) and "json" in one for one in value):
        return "\n".join(json.dumps(one["json"], ensure_ascii=False) for one in value)
    if isinstance(value, list) and (are_parts(value) or holds_media(value)):
        read = read_parts(value)
        return read if isinstance(read, Reject) else read.text
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
