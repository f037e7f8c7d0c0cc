"""Turns: one message of a conversation as a Turn, from the formats of OpenAI, ShareGPT and Gemini."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

from lorafit.data.schema.fields import (
    FLAG_NAMES,
    Fields,
    from_json,
    is_empty,
    kind_of,
    loss_flag,
    read_calls,
    text_fault,
)
from lorafit.data.schema.names import CALL_WORDS, FLAG_WORDS, respelled, with_words, words_of
from lorafit.data.schema.parts import IMAGE_FIX, Parts, are_parts, holds_media, read_parts, text_object
from lorafit.data.schema.records import CALLS, REASONING, Turn
from lorafit.data.schema.turn_forms import unwrapped
from lorafit.data.sources.raw_row import Reject, excerpt

CALL, THOUGHT = "call", "thought"
ROLES = {
    "system": "system", "developer": "system", "platform": "system",
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "bot": "assistant",
    "ai": "assistant", "chatbot": "assistant",
    "tool": "tool", "function": "tool", "observation": "tool", "ipython": "tool", "tool_response": "tool",
    "tool_result": "tool", "tool_results": "tool", "function_response": "tool", "function_call_output": "tool",
    "tool_output": "tool", "tool_outputs": "tool",
    "function_call": CALL, "tool_call": CALL, "tool_calls": CALL,
    "reasoning": THOUGHT, "thinking": THOUGHT, "thought": THOUGHT,
}  # fmt: skip
"""Every name of a role that is read, and what it means."""
PLAIN_ROLES = {name: role for name, role in ROLES.items() if role not in (CALL, THOUGHT)}
SPEAKERS = ("role", "from", "sender", "author", "speaker", "type")
MEDIA = (
    "image", "images", "image_url", "image_path", "image_file", "img", "video", "videos", "video_url", "video_path",
    "audio", "audios", "audio_url", "audio_path", "attachments", "experimental_attachments",
)  # fmt: skip
"""Fields of a turn or a row that hold something else than text."""
REASONING_NAMES = ("reasoning_content", "reasoning", "thinking")
TURN_REASONING = (
    *REASONING_NAMES, "thought", "thoughts", "thinking_content", "reasoning_text", "cot", "chain_of_thought",
    "rationale", "think", "thought_process", "reasoning_trace", "reasoning_steps", "inner_monologue",
    "internal_monologue", "scratchpad", "thinking_text", "tool_plan", "reasoning_details", "thinking_blocks",
)  # fmt: skip
"""Names of an answer's reasoning in its turn; the last two are lists of blocks, OpenRouter's and LiteLLM's."""
THOUGHT_TEXTS = ("text", "thinking", "summary")
CONTENT_NAMES = ("content", "value", "parts", "text", "message", "output", "refusal")
RESULT_NAMES = (*CONTENT_NAMES, "result", "results", "response", "tool_response", "tool_responses", "tool_result")
"""Names of a text; the second list is a tool's."""
CALL_NAMES = ("tool_calls", "function_call", "tool_call")
READ = frozenset(("role", "from", "type", *CALL_NAMES, *CONTENT_NAMES, *TURN_REASONING, *FLAG_NAMES))
READ_OF_TOOLS = READ.union(RESULT_NAMES)
UNCLEAR_FLAGS = ("mask", "masked", "ignore", "ignore_loss", "no_loss", "exclude", "skip", "train_detail")
"""Fields by which some tools keep an answer, or a part of it, from the loss; they do not agree on what means yes."""
TURN_NAMES = READ | {*SPEAKERS, *RESULT_NAMES, *MEDIA, *UNCLEAR_FLAGS, "tool_call_id", "call_id", "name", "channel"}
"""Every name of a turn's field that means something."""


def read_turns(messages: Iterable[Any]) -> list[Turn] | Reject:
    """Return the turns of a list of messages."""
    turns: list[Turn] = []
    thoughts: list[Turn] = []
    for number, message in enumerate(messages, start=1):
        if isinstance(message, dict) and len(message) == 2 and not thoughts:  # most turns
            role, content = message.get("role"), message.get("content")
            if isinstance(role, str) and isinstance(content, str) and role in PLAIN_ROLES:
                turns.append(Turn(PLAIN_ROLES[role], content))
                continue
        read = exchange_in(message) or read_message(message)
        if thoughts and not isinstance(read, Reject):
            read = _after_thoughts(thoughts, read)
        if isinstance(read, Reject):
            fix = read.fix or ("write the turn's text into its 'content'" if read.code in ("D010", "D011") else "")
            return Reject(read.code, f"turn {number}: {read.reason}", fix=fix)
        if turns and speaker_of(message) == CALL and (joined := _joined(turns[-1], read)):
            turns[-1], thoughts = joined, []
            continue
        thoughts = [turn for turn in read if turn.role == THOUGHT]
        turns += [turn for turn in read if turn.role != THOUGHT]
    return Reject("D012", "the last turn is reasoning without an answer", fix="add the answer") if thoughts else turns


def _joined(before: Turn, read: list[Turn]) -> Turn | None:
    """Return the answer before a call's own turn with that call: OpenAI's items of one answer; None if it is apart."""
    if before.role != "assistant" or len(read) != 1 or read[0].reasoning or read[0].loss != before.loss:
        return None
    return Turn("assistant", before.content, {**before.extra, CALLS: [*before.calls, *read[0].calls]}, before.loss)


def _after_thoughts(thoughts: list[Turn], read: list[Turn]) -> list[Turn] | Reject:
    """Return the turns, the first with the thoughts that stood before it in turns of their own."""
    first = read[0]
    if first.role not in ("assistant", THOUGHT):
        return Reject("D012", f"reasoning stands before a turn of the {first.role}", fix="put it before an answer")
    thought = "\n".join(part for part in (*(turn.content for turn in thoughts), first.reasoning) if part)
    if first.role == THOUGHT:
        return [Turn(THOUGHT, "\n".join(part for part in (thought, first.content) if part))]
    extra = {**first.extra, REASONING: thought} if thought else first.extra
    return [Turn(first.role, first.content, extra, first.loss), *read[1:]]


PAIRS = (
    ("input", "output"), ("human", "assistant"), ("human", "gpt"), ("user", "assistant"), ("question", "answer"),
    ("query", "response"), ("instruction", "output"), ("instruction", "response"), ("prompt", "response"),
    ("prompt", "completion"),
)  # fmt: skip
"""Under which two names one element of a list holds a question and its answer."""


def exchange_in(message: Any) -> list[Turn]:
    """Return the two turns of a question and its answer in one object; empty for anything else."""
    if not isinstance(message, dict) or "role" in message or "from" in message:
        return []
    message = {name.lower() if isinstance(name, str) else name: value for name, value in message.items()}
    held = {name for name, value in message.items() if not is_empty(value)}
    for asks, says in PAIRS:
        if held == {asks, says} and isinstance(message[asks], str) and isinstance(message[says], str):
            return [Turn("user", message[asks]), Turn("assistant", message[says])]
    return []


def read_message(message: Any) -> list[Turn] | Reject:
    """Return the turn of `message`, after the tool results inside it."""
    if not isinstance(message, dict):
        return Reject("D012", f"is {kind_of(message)}, not an object with role and content", fix=SHAPE_FIX)
    if len(message) != 2 or "role" not in message:
        message = respelled(unwrapped(message), TURN_NAMES)
    holder = next((name for name in SPEAKERS if message.get(name) is not None), None)
    if holder is None:
        return Reject("D012", "the turn names no role", fix=SHAPE_FIX)
    speaker = message[holder]
    role = ROLES.get(speaker) or ROLES.get(_role_name(speaker)) if isinstance(speaker, str) else None
    if role is None:
        known = ", ".join(sorted(ROLES))
        return Reject("D012", f"the role '{excerpt(str(speaker))}' is none of {known}", fix="use one of those roles")
    content = message.get("content")
    if isinstance(content, str) and len(message) == 2 and role not in (CALL, THOUGHT):
        return [Turn(role, content)]
    if holder not in READ:
        message = {("role" if name == holder else name): value for name, value in message.items() if name != "role"}
    if held := next((name for name in MEDIA if not is_empty(message.get(name))), ""):
        return Reject("D012", f"the turn holds more than text ('{held}')", fix=IMAGE_FIX)
    if role == THOUGHT or (role == "assistant" and message.get("channel") == "analysis"):
        return _thought_alone(message)
    return _called(message) if role == CALL else _full(role, message)


def _role_name(speaker: str) -> str:
    return speaker.strip().lower().replace("-", "_").replace(" ", "_")


def _thought_alone(message: Fields) -> list[Turn] | Reject:
    """Return a turn of reasoning: OpenAI's reasoning item, or gpt-oss' channel of analysis."""
    if not is_empty(message.get("encrypted_content")) and is_empty(message.get("summary")):
        return Reject("D012", "the reasoning is encrypted", fix="leave such rows out with --on-bad drop")
    if calls := next((name for name in CALL_NAMES if not is_empty(message.get(name))), ""):
        return Reject("D012", f"'{calls}' stands in a turn of reasoning", fix="write the calls into an answer")
    found = _thought_in(message.get("summary")) or ""
    if is_empty(found) and (parts := _content("assistant", message, True)):
        if isinstance(parts, Reject):
            return parts
        found = parts.text or parts.reasoning
    if not isinstance(found, str):
        return Reject("D012", f"the reasoning is {kind_of(found)}, not text", fix=THOUGHT_FIX)
    return [Turn(THOUGHT, found)]


SHAPE_FIX = 'write {"role": "user", "content": "…"}'
OF_A_TURN = frozenset((*CONTENT_NAMES, *CALL_NAMES, "arguments", "summary"))
"""Fields of which a turn has at least one."""
TYPES_OF_TURNS = ("human", "ai", "function_call", "function_call_output", "reasoning")
"""Types of LangChain's messages and of OpenAI's items, which no content part and no tool schema has."""


def speakers_in(value: Any) -> list[str]:
    """Return who speaks in a list of turns, in one turn, or in JSON of either; empty for any other value."""
    if isinstance(value, str):
        if value.lstrip()[:1] not in ("[", "{"):
            return []
        try:
            value = from_json(value)
        except ValueError:
            return []
    found = [speaker_of(one) for one in (value if isinstance(value, list) else [value])]
    return found if found and all(found) else []


def speaker_of(message: Any) -> str:
    """Return the meaning of a turn's role; `assistant` for a question with its answer, empty for anything else."""
    if not isinstance(message, dict):
        return ""
    if exchange_in(message):
        return "assistant"
    message = unwrapped(message)
    if OF_A_TURN.isdisjoint(message):
        return ""
    speaker = next((message[name] for name in ("role", "from", "author") if isinstance(message.get(name), str)), None)
    if speaker is None and message.get("type") in TYPES_OF_TURNS:
        speaker = message["type"]
    return ROLES.get(_role_name(speaker), "") if speaker else ""


def as_turns(value: Any, beside_turns: bool) -> Any:
    """Return a list of turns for a turn or a list of them, also as JSON text; any other value unchanged.

    One turn as JSON text counts `beside_turns` only: an answer may be a JSON object.
    """
    if isinstance(value, str) and (TURNS_AS_TEXT.match(value) or (beside_turns and value.lstrip()[:1] == "{")):
        try:
            parsed = from_json(value)
        except ValueError:
            return value
        value = parsed if isinstance(parsed, list) or speaker_of(parsed) else value
    return [value] if isinstance(value, dict) and speaker_of(value) else value


TURNS_AS_TEXT = re.compile(r'\s*\[\s*\{\s*"(?:role|from)"\s*:')


def _full(role: str, message: Fields) -> list[Turn] | Reject:
    loss = loss_flag(message) if role != "assistant" else _unclear_flag(message) or loss_flag(message)
    reasoned = _reasoning(message)
    calls = _unread_calls(role, message) or _calls(role, message)
    for part in (loss, reasoned, calls):
        if isinstance(part, Reject):
            return part
    assert isinstance(reasoned, str) and isinstance(calls, list) and not isinstance(loss, Reject)
    if reasoned and role != "assistant":
        return _misplaced("reasoning", role)
    parts = _content(role, message, bool(calls) or bool(reasoned))
    if isinstance(parts, Reject):
        return parts
    if parts.calls and role != "assistant":
        return _misplaced("a tool call", role)
    if parts.reasoning and role != "assistant":
        return _misplaced("reasoning", role)
    if parts.results and role == "assistant":
        return _misplaced("a tool's result", role)
    read = READ if role != "tool" else READ_OF_TOOLS
    extra = {name: value for name, value in message.items() if name not in read and value is not None} | parts.beside
    if role == "tool" and "call_id" in extra:
        extra.setdefault("tool_call_id", extra.pop("call_id"))
    if thought := "\n".join(part for part in (reasoned, parts.reasoning) if part):
        extra[REASONING] = thought
    if calls := [*calls, *parts.calls]:
        extra[CALLS] = calls
    if parts.results and not parts.text:
        return parts.results
    return [*parts.results, Turn(role, parts.text, extra, loss)]


def _unclear_flag(message: Fields) -> Reject | None:
    name = next((each for each in UNCLEAR_FLAGS if message.get(each) is not None), "")
    names = with_words(tuple(message), FLAG_WORDS, TURN_NAMES) if not name else ()
    name = name or next((each for each in names if _seems_flag(each, message[each])), "")
    if not name:
        return None
    what = f"the field '{name}' seems to be a loss flag, and tools do not agree on its sense"
    return Reject("D012", what, fix='write "weight": 1 into answers to learn and "weight": 0 into the others')


def _seems_flag(name: str, value: Any) -> bool:
    """Return True for a flag's value; a fraction beside a name that ends in loss, as train_loss, is a measurement."""
    is_fraction = isinstance(value, float) and not value.is_integer()
    return is_flag(value) and not (is_fraction and words_of(name)[-1] in ("loss", "losses"))


def is_flag(value: Any) -> bool:
    """Return True for what a loss flag may be: true, false, a number from 0 to 1, or a list of 0 and 1."""
    if isinstance(value, list):
        return bool(value) and all(isinstance(one, bool | int | float) and one in (0, 1) for one in value)
    if isinstance(value, str):
        return value.strip().lower() in ("true", "false")
    return isinstance(value, bool | int | float) and 0 <= value <= 1


def _unread_calls(role: str, message: Fields) -> Reject | None:
    """Return the fault of a field that seems to hold tools, calls or results, under a name that is not read."""
    apart = ("tools", "functions") if role == "system" else ()
    for name in with_words(tuple(message), CALL_WORDS, TURN_NAMES):
        if name not in apart and isinstance(message[name], list | dict) and message[name]:
            what = f"the field '{excerpt(name, 30)}' seems to hold tools, calls or results, and is not read"
            return Reject("D012", what, fix="write schemas as the row's 'tools', calls as 'tool_calls' of an answer")
    return None


def _misplaced(what: str, role: str) -> Reject:
    fix = "reasoning and calls are the assistant's, results the tool's"
    return Reject("D012", f"{what} stands in a turn of the {role}", fix=fix)


def _called(message: Fields) -> list[Turn] | Reject:
    """Return the turn of a call: ShareGPT's function_call with JSON text, or OpenAI's call item."""
    loss = loss_flag(message)
    if isinstance(message.get("name"), str) and "arguments" in message:
        call = {name: message[name] for name in ("name", "arguments")}
        calls = read_calls(call | ({"id": message["call_id"]} if message.get("call_id") else {}), "function_call")
        parts: Parts | Reject = Parts(calls=calls) if not isinstance(calls, Reject) else calls
    else:
        parts = _content("assistant", message, False)
    if isinstance(loss, Reject):
        return loss
    if isinstance(parts, Reject):
        return parts
    calls = [] if parts.calls else read_calls(parts.text, "function_call")
    return calls if isinstance(calls, Reject) else [Turn("assistant", "", {CALLS: [*parts.calls, *calls]}, loss)]


def _calls(role: str, message: Fields) -> list[Fields] | Reject:
    found: list[Fields] = []
    for name in CALL_NAMES:
        if not message.get(name):
            continue
        if role != "assistant":
            return Reject("D012", f"'{name}' stands in a turn of the {role}", fix="only the assistant calls tools")
        calls = read_calls(message[name], name)
        if isinstance(calls, Reject):
            return calls
        # some tools write one call in its old and its new form
        known = [call["function"] for call in found]
        found += [call for call in calls if call["function"] not in known]
    return found


def _reasoning(message: Fields) -> str | Reject:
    """Return the reasoning of an answer, under any of its names."""
    found = ""
    for name in TURN_REASONING:
        value = _thought_in(message.get(name))
        if value is None or value == "":
            continue
        if not isinstance(value, str):
            return Reject("D012", f"the field '{name}' is {kind_of(value)}, not text", fix=THOUGHT_FIX)
        if found and found.strip() != value.strip():
            return Reject(
                "D012", f"the turn has two texts of reasoning, one of them in '{name}'", fix="keep one of them"
            )
        found = value
    return found


THOUGHT_FIX = "write the reasoning as one text"


def _thought_in(value: Any) -> Any:
    """The text of blocks of reasoning; any other value, and blocks without text, as they are."""
    if not isinstance(value, list):
        return value
    texts = [
        next((block[name] for name in THOUGHT_TEXTS if isinstance(block.get(name), str)), None)
        if isinstance(block, dict)
        else None
        for block in value
    ]
    return "\n".join(text for text in texts if text) if None not in texts else value


def _content(role: str, message: Fields, may_lack: bool) -> Parts | Reject:
    """Return the content of a turn. A list of text parts counts as one text."""
    names = RESULT_NAMES if role == "tool" else CONTENT_NAMES
    given = [each for each in names if message.get(each) is not None]
    name = next((each for each in given if message[each] not in ("", [])), given[0] if given else "")
    value = message.get(name)
    if any(message[other] not in ("", [], value) for other in given if other != name):
        return Reject("D012", f"the turn has a text in '{name}' and another one beside it", fix="keep one of the two")
    if isinstance(value, str):
        return Parts(value)
    if isinstance(value, list) and (role != "tool" or are_parts(value) or holds_media(value)):
        return read_parts(value)
    if isinstance(value, dict) and role != "tool" and (inside := text_object(value)):
        return read_parts(inside)
    if role == "tool" and value is not None:
        return Parts(json.dumps(value, ensure_ascii=False))  # what a tool returned is JSON, and becomes its text
    if value is None and may_lack:
        return Parts()
    return text_fault(message, name or ("value" if "from" in message else "content")) or Parts()
