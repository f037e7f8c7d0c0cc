"""RawRow: one row of a file before it has a shape, or a Reject with the reason."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


def excerpt(text: str, limit: int = 60) -> str:
    """Return `text` with line ends as ⏎ and unprintable characters escaped, cut to `limit` characters."""
    cut = text[: limit + 1].replace("\r\n", "\n").replace("\n", "⏎")
    if not cut.isprintable():
        cut = "".join(char if char.isprintable() else _escaped(char) for char in cut)
    return cut if len(cut) <= limit else cut[: limit - 1] + "…"


def _escaped(char: str) -> str:
    code = ord(char)
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


RAW_LIMIT_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class Reject:
    """A row that cannot be used: its `code`, the `reason`, and the 1-based `column` if known.

    `line_offset` counts the line ends between the row's first line and the fault; `excerpt` is the text there. `fix`
    is what mends this fault, where the code's own fix does not.
    """

    code: str
    reason: str
    column: int = 0
    line_offset: int = 0
    excerpt: str = ""
    fix: str = ""

    def place(self, name: str, line: int) -> str:
        """Return `file:line:column`, or `file:line` when the fault has no column."""
        place = f"{name}:{line + self.line_offset}"
        return f"{place}:{self.column}" if self.column else place


def rejected_line(source: str, reject: Reject, raw: bytes) -> bytes:
    """Return one line of rejected.jsonl. Of a raw row longer than 64 KiB it keeps the beginning, and says so."""
    entry = {"source": source, "code": reject.code, "reason": reject.reason}
    entry["raw"] = raw[:RAW_LIMIT_BYTES].decode("utf-8", "backslashreplace")
    if len(raw) > RAW_LIMIT_BYTES:
        entry["raw_bytes"] = str(len(raw))
    return json.dumps(entry, ensure_ascii=True).encode() + b"\n"


MAX_DEPTH = 64
CUT_OFF = "cut off before its end"
# possessive, and with a text that never ends: no character is looked at twice
FENCE = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[\[{]|[\]}]', re.DOTALL)


@dataclass(slots=True)
class RawRow:
    """The place of a row (`file` is an index, `line` counts from 1), and its fields or a Reject.

    `raw` is the row's text, where the file has one; `size_bytes` is about what the row takes; `number` counts the rows
    of all files as they are read.
    """

    file: int
    line: int
    raw: bytes
    fields: Mapping[str, Any] | None = None
    reject: Reject | None = None
    size_bytes: int = 0
    number: int = 0

    def __post_init__(self) -> None:
        self.size_bytes = self.size_bytes or len(self.raw)


class _FieldTwice(Exception):
    pass


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise _FieldTwice(name)
            seen.add(name)
    return fields


_decode = json.JSONDecoder(object_pairs_hook=_object).decode


def parse_row(raw: bytes) -> Mapping[str, Any] | Reject:
    """Return the fields of one JSON object in UTF-8, or a Reject with the fault and its column."""
    try:
        text = raw.decode()
        if (text.count("{") + text.count("[")) > MAX_DEPTH and _depth(text) > MAX_DEPTH:
            return Reject("D007", f"nested deeper than {MAX_DEPTH} levels")
        fields = _decode(text)
    except UnicodeDecodeError as error:
        return _not_utf8(raw, error)
    except json.JSONDecodeError as error:
        return _broken(text, error.msg, error.pos)
    except _FieldTwice as error:
        return Reject("D003", f"the field '{excerpt(str(error))}' stands twice")
    except RecursionError:
        return Reject("D007", f"nested deeper than {MAX_DEPTH} levels")
    except ValueError as error:  # a number of more digits than Python converts
        return Reject("D001", f"holds an unreadable value ({error})")
    if not isinstance(fields, dict):
        kind = {list: "an array", str: "a text", bool: "true or false", type(None): "null"}.get(
            type(fields), "a number"
        )
        fix = 'write {"messages": …} around each list' if _are_turns(fields) else ""
        return Reject("D002", f"the line is {kind}, not an object", 1, excerpt=excerpt(text), fix=fix)
    return fields


def _are_turns(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(one, dict) for one in value)


def _depth(text: str) -> int:
    depth = deepest = 0
    for match in FENCE.finditer(text):
        opens = match[0] in "[{"
        if opens:
            depth, deepest = depth + 1, max(deepest, depth + 1)
        elif match[0] in "]}":
            depth -= 1
    return deepest


def _not_utf8(raw: bytes, error: UnicodeDecodeError) -> Reject:
    bad = raw[error.start]
    column = len(raw[: error.start].decode("utf-8", "replace")) + 1
    if bad == 0xED:
        return Reject("D043", "holds half a surrogate pair", column)
    guess = raw[max(0, error.start - 15) : error.start + 15].decode("latin-1")
    return Reject("D004", f"byte 0x{bad:02x} is not UTF-8 (Latin-1 would read '{excerpt(guess)}')", column)


def _broken(text: str, message: str, position: int) -> Reject:
    line_offset = text.count("\n", 0, position)
    column = position - (text.rfind("\n", 0, position) + 1) + 1
    near = excerpt(text[max(0, position - 20) : position + 20])
    here, before = text[position : position + 1], text[:position].rstrip()
    code, reason = "D001", message[:1].lower() + message[1:]
    if "control character" in message:
        code, reason = "D005", f"raw control character {here!r} inside a text"
    elif "\0" in text:
        code, reason = "D005", "raw NUL bytes"
    elif before.endswith(",") and here in ("}", "]"):
        reason = f"trailing comma before '{here}'"
    elif here == "'":
        reason = "single quotes; JSON wants double ones"
    elif not text[position:].strip() or message.startswith("Unterminated string"):
        reason = CUT_OFF
    elif message == "Extra data":
        reason = "more text after the object; one object per line"
    return Reject(code, reason, column, line_offset, near)
