"""Shape: how the fields of a row spell a Record. One shape per dataset, detected from its first rows."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lorafit.data.schema.records import Record, Turn
from lorafit.data.sources.raw_row import Reject, excerpt
from lorafit.errors import DataError, UsageError

Fields = Mapping[str, Any]
ANSWERS = ("response", "output", "completion", "answer")
MAPPABLE = ("system", "instruction", "input", "prompt", *ANSWERS, "messages", "conversations", "tools")
OPTIONAL = ("system", "input", "tools")
ROLES = {"system", "developer", "user", "assistant", "tool", "function"}
SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_call": "assistant",
}


@dataclass(frozen=True)
class Shape:
    """`kind` (instruction, prompt, messages or conversations), the `answer` field, and the names the user mapped."""

    kind: str
    answer: str = ""
    mapped: Mapping[str, str] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """The shape as people know it."""
        names = {
            "instruction": f"instruction/input/{self.answer}",
            "prompt": f"prompt/{self.answer}",
            "messages": "messages (OpenAI)",
            "conversations": "conversations (ShareGPT)",
        }
        return names[self.kind]

    def record(self, fields: Fields, source: str) -> Record | Reject:
        """The record that `fields` spell, or the Reject that says which field is at fault."""
        row = renamed(fields, self.mapped)
        read: Callable[[Fields, str], Record | Reject] = {
            "instruction": self._instruction,
            "prompt": self._prompt,
            "messages": self._messages,
            "conversations": self._conversations,
        }[self.kind]
        return read(row, source)

    def _instruction(self, row: Fields, source: str) -> Record | Reject:
        fault = _text_fault(row, "instruction") or _text_fault(row, self.answer) or _optional_fault(row, "input")
        if fault:
            return fault
        asked = row["instruction"]
        if extra := (row.get("input") or "").strip():
            asked = f"{asked.rstrip()}\n{extra}" if asked.strip() else extra
        return _exchange(row, asked, row[self.answer], source)

    def _prompt(self, row: Fields, source: str) -> Record | Reject:
        asked, answered = row.get("prompt"), row.get(self.answer)
        if isinstance(asked, list) and isinstance(answered, list):
            return _asked_in_turns(row, asked, answered, source)
        fault = _text_fault(row, "prompt") or _text_fault(row, self.answer)
        return fault or _exchange(row, row["prompt"], row[self.answer], source)

    def _messages(self, row: Fields, source: str) -> Record | Reject:
        return _conversation(row, "messages", _openai_turn, source)

    def _conversations(self, row: Fields, source: str) -> Record | Reject:
        return _conversation(row, "conversations", _sharegpt_turn, source)


def renamed(fields: Fields, mapped: Mapping[str, str]) -> Fields:
    """The row with each mapped field under the name lorafit knows it by."""
    if not mapped:
        return fields
    return {**fields, **{ours: fields[theirs] for ours, theirs in mapped.items() if theirs in fields}}


def check_map(mapped: Mapping[str, str]) -> None:
    """Raises UsageError when `--map` names a field that lorafit does not know."""
    for ours in mapped:
        if ours not in MAPPABLE:
            near = difflib.get_close_matches(ours, MAPPABLE, n=1)
            fix = f"did you mean '{near[0]}'?" if near else "the left side is one of " + ", ".join(MAPPABLE)
            raise UsageError(f"'{ours}' is no field of a row", where="--map", fix=fix)


def detect(rows: Sequence[Fields], mapped: Mapping[str, str], where: str) -> Shape:
    """The shape most of `rows` have. Raises DataError naming the fields there are when it is none of ours."""
    check_map(mapped)
    _check_mapped_names(rows, mapped)
    votes = Counter(shape for row in rows if (shape := _shape_of(renamed(row, mapped))))
    if not votes:
        if known := _known_trouble(rows):
            raise DataError(known[0], where=where, fix=known[1])
        names = _listed(str(name) for row in rows[:100] for name in row)
        raise DataError(
            f"the rows' fields ({names}) are none of instruction/response, prompt/completion, messages, conversations",
            where=where,
            fix="name them, as in --map instruction=question --map response=answer_text",
        )
    kind, answer = votes.most_common(1)[0][0]
    return Shape(kind, answer, dict(mapped))


def _check_mapped_names(rows: Sequence[Fields], mapped: Mapping[str, str]) -> None:
    """Raises UsageError when a field that every row needs is mapped to one that none of `rows` has."""
    names = {str(name) for row in rows for name in row} if mapped else set()
    for ours, theirs in mapped.items():
        if names and theirs not in names and ours not in OPTIONAL:
            near = difflib.get_close_matches(theirs, names, n=1)
            fix = f"did you mean '{near[0]}'?" if near else f"the rows have {_listed(names)}"
            message = f"no row has the field '{excerpt(theirs, 30)}' that '{ours}' is to be"
            raise UsageError(message, where="--map", fix=fix)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted({excerpt(name, 30) for name in names})[:12]) or "none"


def _known_trouble(rows: Sequence[Fields]) -> tuple[str, str] | None:
    """What is wrong, and what to do, with rows of a kind that people often have; None for others."""
    for name in ("messages", "conversations"):
        if any(isinstance(row.get(name), str) for row in rows):
            return f"the field '{name}' is a text, not a list of turns", "write the list itself, not its JSON in quotes"
    if (
        rows
        and all("text" in row for row in rows)
        and not any({*ANSWERS, "prompt", "instruction"} & {*row} for row in rows)
    ):
        what = "the rows have a 'text' and do not say what of it is asked and what is answered"
        return what, "write prompt and completion, or messages: the template and the loss go by them"
    return None


def _shape_of(row: Fields) -> tuple[str, str] | None:
    for kind in ("messages", "conversations"):
        if isinstance(row.get(kind), list):
            return kind, ""
    answer = next((name for name in ANSWERS if name in row), "")
    for kind in ("instruction", "prompt"):
        if answer and kind in row:
            return kind, answer
    return None


def _text_fault(row: Fields, name: str) -> Reject | None:
    if name not in row:
        near = difflib.get_close_matches(name, [str(key) for key in row], n=1)
        hint = f" (there is '{excerpt(near[0])}')" if near else ""
        return Reject("D010", f"no field '{name}'{hint}")
    if row[name] is None:
        return Reject("D011", f"the field '{name}' is null")
    return _optional_fault(row, name)


def _optional_fault(row: Fields, name: str) -> Reject | None:
    value = row.get(name)
    if value is None or isinstance(value, str):
        return None
    return Reject("D012", f"the field '{name}' is {_kind(value)}, not text")


def _kind(value: Any) -> str:
    kinds = {str: "a text", bool: "true or false", int: "a number", float: "a number", list: "a list"}
    return {**kinds, dict: "an object", type(None): "null"}.get(type(value), f"a {type(value).__name__}")


def _exchange(row: Fields, asked: str, answered: str, source: str) -> Record | Reject:
    if fault := _optional_fault(row, "system"):
        return fault
    return Record((Turn("user", asked), Turn("assistant", answered)), source, row.get("system") or None)


def _asked_in_turns(row: Fields, asked: list[Any], answered: list[Any], source: str) -> Record | Reject:
    """TRL's conversational prompt and completion: turns on both sides."""
    if any(isinstance(message, dict) and message.get("role") == "assistant" for message in asked):
        # only the completion is to be learnt, and of a conversation every answer is
        return Reject(
            "D012", "the prompt has an assistant turn; where that is to be learnt too, make 'messages' of all"
        )
    return _conversation({**row, "messages": [*asked, *answered]}, "messages", _openai_turn, source)


def _conversation(row: Fields, name: str, read: Callable[[Any], Turn | Reject], source: str) -> Record | Reject:
    if name not in row:
        return _text_fault(row, name) or Reject("D010", f"no field '{name}'")
    if not isinstance(row[name], list):
        code = "D011" if row[name] is None else "D012"
        return Reject(code, f"the field '{name}' is not a list of turns")
    turns: list[Turn] = []
    for number, message in enumerate(row[name], start=1):
        turn = read(message)
        if isinstance(turn, Reject):
            return Reject(turn.code, f"turn {number}: {turn.reason}")
        turns.append(turn)
    fault = _optional_fault(row, "system")
    tools = row.get("tools") or []
    if fault is None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        fault = Reject("D012", "the field 'tools' is not a list of objects")
    return fault or _assembled(turns, tuple(tools), row.get("system") or None, source)


def _assembled(turns: list[Turn], tools: tuple[Fields, ...], system: str | None, source: str) -> Record | Reject:
    if turns and turns[0].role in ("system", "developer"):
        system = "\n".join(part for part in (system, turns.pop(0).content) if part) or None
    if not any(turn.role == "assistant" for turn in turns):
        return Reject("D016", "the conversation has no assistant turn")
    return Record(tuple(turns), source, system, tools)


def _openai_turn(message: Any) -> Turn | Reject:
    if not isinstance(message, dict):
        return Reject("D012", f"is {_kind(message)}, not an object with role and content")
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        return Reject("D012", f"the role '{excerpt(str(role))}' is none of {', '.join(sorted(ROLES))}")
    extra = {name: value for name, value in message.items() if name not in ("role", "content") and value is not None}
    if message.get("content") is None and "tool_calls" in extra:
        return Turn(role, "", extra)
    content = _content(message, "content")
    return content if isinstance(content, Reject) else Turn(role, content, extra)


def _sharegpt_turn(message: Any) -> Turn | Reject:
    if not isinstance(message, dict):
        return Reject("D012", f"is {_kind(message)}, not an object with from and value")
    speaker = message.get("from", message.get("role"))
    role = SHAREGPT_ROLES.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        known = ", ".join(sorted(SHAREGPT_ROLES))
        return Reject("D012", f"the speaker '{excerpt(str(speaker))}' is none of {known}")
    content = _content(message, "content" if "content" in message and "value" not in message else "value")
    return content if isinstance(content, Reject) else Turn(role, content)


def _content(message: Fields, name: str) -> str | Reject:
    """The text of a turn; a list of text parts counts as one text."""
    value = message.get(name)
    if isinstance(value, list):
        return _joined(value)
    return value if isinstance(value, str) else _text_fault(message, name) or ""


def _joined(parts: Iterable[Any]) -> str | Reject:
    texts = []
    for part in parts:
        text = part.get("text") if isinstance(part, dict) and part.get("type", "text") == "text" else None
        if not isinstance(text, str):
            return Reject("D012", "the content holds something that is not text (an image?)")
        texts.append(text)
    return "".join(texts)
