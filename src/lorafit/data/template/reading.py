"""Reading: the form in which a chat template takes reasoning, calls and their ids, found by rendering one of each."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lorafit.data.schema.records import CALLS, REASONING
from lorafit.data.template.call_ids import with_short_ids
from lorafit.data.template.layout import CALLS_APART, IDS_MADE, REASONING_JOINED, REASONING_SPLIT, TAGS_LEFT, Message
from lorafit.data.template.renderer import Rendering, Request, TemplateRenderer
from lorafit.data.template.single_calls import one_call_a_turn
from lorafit.data.template.thoughts import CHANNELS, HINTS, TAGS, split_thought, tags_in

REASONING_NAMES = ("reasoning_content", "reasoning", "thinking")
REASON, ANSWER, QUESTION, SECOND = "Wv5tqz", "Zq7xk", "What is it?", "Kd8rwp"
Tags = tuple[tuple[str, str], ...]
LONG_ID, SHORT_ID = "call_Zq7xkWv5tqz", "Zq7xkWv5t"


@dataclass(frozen=True, slots=True)
class Fitted:
    """Messages in the form that a template takes.

    Attributes:
        messages: the messages.
        changed: names of what was changed, from layout.py.
        places: the place that each message had before; empty if all have kept it.
    """

    messages: list[Message]
    changed: tuple[str, ...] = ()
    places: Sequence[int] = ()


@dataclass(frozen=True)
class Reading:
    """The form of turns that a template reads.

    Attributes:
        reasoning: the name under which it reads reasoning.
        takes_objects: whether it takes a call's arguments as objects, not as JSON in a text.
        split_tags: tags in an answer's text whose content it takes as reasoning instead.
        foreign_tags: tags that it would show as text, though it writes reasoning in a way of its own.
        joins_reasoning: whether a turn with a call has room for its reasoning or its text, not for both.
        short_ids: whether ids of calls must be nine letters and digits.
        single_calls: whether it takes one call a turn.
    """

    reasoning: str = REASONING
    takes_objects: bool = True
    split_tags: Tags = ()
    foreign_tags: Tags = ()
    joins_reasoning: bool = False
    short_ids: bool = False
    single_calls: bool = False

    def fitted(self, messages: list[Message]) -> Fitted:
        """Return the messages with reasoning, calls and ids where the template takes them."""
        problems: dict[str, None] = {}
        places: Sequence[int] = ()
        if self.single_calls and any(len(message.get(CALLS, ())) > 1 for message in messages):
            given = len(messages)
            messages, places = one_call_a_turn(messages)
            problems |= {CALLS_APART: None} if len(messages) > given else {}
        if self.foreign_tags:
            messages = [self._without_tags(message, problems) for message in messages]
        if self.joins_reasoning:
            messages = [_joined(message, problems) for message in messages]
        if self.short_ids and any(len(message) > 2 for message in messages):
            messages, made = with_short_ids(messages)
            problems |= {IDS_MADE: None} if made else {}
        return Fitted(messages, tuple(problems), places)

    def written(self, messages: list[Message]) -> list[Message]:
        """Return fitted messages under the names that the template reads."""
        if self.reasoning == REASONING and self.takes_objects:
            return messages
        return [self._one(message) if len(message) > 2 else message for message in messages]

    def _one(self, message: Message) -> Message:
        one = {self.reasoning if key == REASONING else key: value for key, value in message.items()}
        if CALLS in one and not self.takes_objects:
            one[CALLS] = [_with_text_arguments(call) for call in one[CALLS]]
        return one

    def _without_tags(self, message: Message, problems: dict[str, None]) -> Message:
        content = message.get("content")
        if message.get("role") != "assistant" or not isinstance(content, str) or not _hints_at_tags(content):
            return message
        found = split_thought(content, self.split_tags) or self._in_other_capitals(content)
        has_answer = found and (found[1] or CALLS in message)
        if found and has_answer and (message.get(REASONING) or "").strip() in (found[0], ""):
            problems[REASONING_SPLIT] = None
            message = {**message, "content": found[1], **({REASONING: found[0]} if found[0] else {})}
        if tags_in(message["content"], self.foreign_tags) or self._is_open(message["content"]):
            problems[TAGS_LEFT] = None
        return message

    @cached_property
    def _own_tags(self) -> Tags:
        return tuple(pair for pair in TAGS if pair not in self.foreign_tags)

    def _in_other_capitals(self, content: str) -> tuple[str, str] | None:
        """Return (reasoning, answer) where they stand apart by the template's own tags in other capitals."""
        other = tuple(pair for pair in self._own_tags if pair[1] not in content and pair[1].lower() in content.lower())
        return split_thought(content, other) if other and self.split_tags else None

    def _is_open(self, content: str) -> bool:
        """Return True if one of the template's own tags is opened and not closed, as in an answer that was cut off."""
        lowered = content.lower()
        return any(lowered.count(one.lower()) > lowered.count(other.lower()) for one, other in self._own_tags)


def _hints_at_tags(content: str) -> bool:
    lowered = content.lower()
    return any(hint in lowered for hint in HINTS)


def _joined(message: Message, problems: dict[str, None]) -> Message:
    if CALLS not in message or not message.get("content") or not message.get(REASONING):
        return message
    problems[REASONING_JOINED] = None
    return {**message, "content": "", REASONING: f"{message[REASONING]}\n\n{message['content']}"}


def _with_text_arguments(call: Any) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or isinstance(function.get("arguments"), str):
        return call
    return {**call, "function": {**function, "arguments": json.dumps(function.get("arguments"), ensure_ascii=False)}}


def reading_of(renderer: TemplateRenderer) -> Reading:
    """Return the form of reasoning, calls and ids that the template reads."""
    names = [name for name in REASONING_NAMES if REASON in _shown(renderer, {"content": ANSWER, name: REASON})]
    reasoning = names[0] if names else REASONING
    called = call_of(SHORT_ID)
    takes_objects = REASON in _shown(renderer, {"content": "", CALLS: [called]})
    as_text = _with_text_arguments(called)
    takes_objects = takes_objects or REASON not in _shown(renderer, {"content": "", CALLS: [as_text]})
    usable = called if takes_objects else as_text
    takes_call = REASON in _shown(renderer, {"content": "", CALLS: [usable]})
    second = {**usable, "function": {**usable["function"], "name": SECOND}}
    beside = {CALLS: [usable], reasoning: REASON}
    split_tags, foreign_tags = _tags(renderer, reasoning if names else "")
    return Reading(
        reasoning,
        takes_objects,
        split_tags,
        foreign_tags,
        joins_reasoning=bool(names)
        and bool(_shown(renderer, {"content": "", **beside}))
        and not _shown(renderer, {"content": ANSWER, **beside}),
        single_calls=takes_call and SECOND not in _shown(renderer, {"content": "", CALLS: [usable, second]}),
        short_ids=bool(_answered(renderer, usable, SHORT_ID)) and not _answered(renderer, usable, LONG_ID),
    )


def _tags(renderer: TemplateRenderer, reasoning: str) -> tuple[Tags, Tags]:
    """Return (tags to take out of texts, foreign tags); `reasoning` is the field that the template reads, if any."""
    source = renderer.source
    if not reasoning:
        own = [pair for pair in TAGS if pair[0] in source]
        has_channel = any(mark in source for mark in CHANNELS)
        return (), tuple(pair for pair in TAGS if pair not in own) if has_channel else ()
    apart = _shown(renderer, {"content": ANSWER, reasoning: REASON})
    reads_itself = _shown(renderer, {"content": f"<think>\n{REASON}\n</think>\n\n{ANSWER}"}) == apart
    foreign = TAGS[1:] if reads_itself else TAGS
    return foreign, foreign


def call_of(name: str) -> Message:
    """Return a call of the probe's tool with the id `name`."""
    return {"id": name, "type": "function", "function": {"name": "probe", "arguments": {"x": REASON}}}


CALLED_TOOL: Message = {
    "type": "function",
    "function": {"name": "probe", "description": "Probe.", "parameters": {"type": "object", "properties": {}}},
}
"""The schema of the probe's tool."""


def _shown(renderer: TemplateRenderer, answer: Mapping[str, Any], *more: Message) -> str:
    """Return the text of a question and this answer; empty if the template refuses them."""
    messages: list[Message] = [{"role": "user", "content": QUESTION}, {"role": "assistant", **answer}, *more]
    found = renderer.render(Request(messages))
    return found.text if isinstance(found, Rendering) else ""


def _answered(renderer: TemplateRenderer, call: Message, name: str) -> str:
    """Return the text of a call with this id and its result."""
    result = {"role": "tool", "name": "probe", "content": ANSWER, "tool_call_id": name}
    return _shown(renderer, {"content": "", CALLS: [{**call, "id": name}]}, result)
