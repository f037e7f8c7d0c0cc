"""Fields: texts, JSON inside strings, loss flags, tool schemas and tool calls."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from typing import Any

from lorafit.data.sources.raw_row import Reject, excerpt

Fields = Mapping[str, Any]
LOSS_FLAGS = (
    "weight", "train", "training", "trainable", "loss", "loss_mask", "loss_weight", "supervised", "learn", "learnable",
    "calculate_loss", "compute_loss", "train_on_turn",
)  # fmt: skip
"""Fields of a turn by which other tools say whether it is learnt (OpenAI, Axolotl, ms-swift and others)."""
FLAG_NAMES = frozenset(LOSS_FLAGS)


def kind_of(value: Any) -> str:
    """Return the name of a JSON value's kind."""
    kinds = {str: "a text", bool: "true or false", int: "a number", float: "a number", list: "a list"}
    return {**kinds, dict: "an object", type(None): "null"}.get(type(value), f"a {type(value).__name__}")


def text_fault(row: Fields, name: str) -> Reject | None:
    """Return the fault of a field that must be a text, or None."""
    if name not in row:
        near = difflib.get_close_matches(name, [str(key) for key in row], n=1)
        hint = f" (there is '{excerpt(near[0])}')" if near else ""
        return Reject("D010", f"no field '{name}'{hint}")
    if row[name] is None:
        return Reject("D011", f"the field '{name}' is null")
    return optional_fault(row, name)


def optional_fault(row: Fields, name: str) -> Reject | None:
    """Return the fault of a field that must be a text, null or missing, or None."""
    value = row.get(name)
    if value is None or isinstance(value, str):
        return None
    return Reject("D012", f"the field '{name}' is {kind_of(value)}, not text")


def is_empty(value: Any) -> bool:
    """Return True for null, blanks, an empty list or an empty object."""
    return value is None or (
        not value.strip() if isinstance(value, str) else isinstance(value, list | dict) and not value
    )


def from_json(value: Any) -> Any:
    """Return the value of a JSON text, and any other value unchanged. Raises ValueError if a text is not JSON."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except RecursionError as error:
        raise ValueError("it nests too deep") from error


def without_null_members(value: Any) -> Any:
    """Return the value without the nulls that Arrow writes for missing members of objects."""
    if isinstance(value, dict):
        return {name: without_null_members(cell) for name, cell in value.items() if cell is not None}
    return [without_null_members(cell) for cell in value] if isinstance(value, list) else value


def loss_flag(message: Fields) -> bool | Reject | None:
    """Return the turn's own loss flag, or None."""
    found: bool | None = None
    for name in LOSS_FLAGS:
        value = message.get(name)
        if value is None:
            continue
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            fix = "write 1 or true for an answer to learn, 0 or false for any other"
            return Reject(
                "D012", f"the loss flag '{name}' is {excerpt(repr(value), 20)}, not 0, 1, true or false", fix=fix
            )
        if found is not None and found != bool(value):
            return Reject("D012", f"the loss flag '{name}' contradicts another one", fix="keep one of the two flags")
        found = bool(value)
    return found


def read_tools(row: Fields, name: str) -> tuple[Fields, ...] | Reject:
    """Return the tool schemas of a field, each as {"type": "function", "function": {…}}. A JSON text is parsed."""
    try:
        tools = from_json(row[name]) if not is_empty(row[name]) else []
    except ValueError as error:
        return Reject("D012", f"the field '{name}' is a text that is no JSON ({error})", fix="write the list itself")
    if isinstance(tools, dict) and isinstance(tools.get("tools"), list):
        tools = tools["tools"]  # Bedrock's toolConfig
    if isinstance(row[name], list | dict):
        tools = without_null_members(tools)
    if not isinstance(tools, list):
        return Reject("D012", f"the field '{name}' is not a list of objects", fix="write a list of tool schemas")
    read = [_tool(tool) for group in tools for tool in _declared(group)]
    if any(tool is None for tool in read):
        return Reject("D012", f"the field '{name}' is not a list of objects", fix="write a list of tool schemas")
    return tuple(tool for tool in read if tool is not None)


KWARGS = "chat_template_kwargs"
RESERVED = ("messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "tokenize")
"""Names that a chat template gets from its caller."""


def read_kwargs(row: Fields) -> Fields | Reject:
    """Return the row's template variables. A JSON text is parsed, and Arrow's null members are left out."""
    try:
        value = from_json(row[KWARGS]) if not is_empty(row.get(KWARGS)) else {}
    except ValueError as error:
        return Reject(
            "D012", f"the field '{KWARGS}' is a text that is no JSON ({error})", fix="write the object itself"
        )
    if not isinstance(value, dict):
        what = f"the field '{KWARGS}' is {kind_of(value)}, not an object"
        return Reject("D012", what, fix='write {"enable_thinking": false}')
    if taken := next((name for name in RESERVED if value.get(name) is not None), ""):
        what = f"the field '{KWARGS}' sets '{taken}', which is the row's own to say"
        return Reject("D012", what, fix=f"take '{taken}' out of it")
    return {str(name): one for name, one in value.items() if one is not None}


def _declared(group: Any) -> list[Any]:
    """Return the tools of one element: several if Gemini groups its declarations, else itself."""
    for name in ("functionDeclarations", "function_declarations"):
        if isinstance(group, dict) and isinstance(group.get(name), list):
            return list(group[name])
    return [group]


SCHEMA_NAMES = ("input_schema", "inputSchema", "parametersJsonSchema")
"""What Anthropic, Bedrock and Gemini call a tool's `parameters`."""


def _as_function(tool: Fields) -> Fields:
    """Return the members of {"name": …, "parameters": …} of any tool that is not wrapped as a function."""
    function = {key: part for key, part in tool.items() if key not in ("type", "cache_control", *SCHEMA_NAMES)}
    schema = next((tool[name] for name in SCHEMA_NAMES if tool.get(name) is not None), None)
    if isinstance(schema, dict) and set(schema) == {"json"}:
        schema = schema["json"]
    return function if schema is None else {**function, "parameters": schema}


def _tool(value: Any) -> Fields | None:
    try:
        tool = from_json(value)
        if not isinstance(tool, dict):
            return None
        if isinstance(tool.get("toolSpec"), dict):
            tool = tool["toolSpec"]
        if "function" not in tool and "name" in tool:
            tool = {"type": "function", "function": _as_function(tool)}
        function = tool.get("function")
        if isinstance(function, dict) and isinstance(function.get("parameters"), str):
            tool = {**tool, "function": {**function, "parameters": from_json(function["parameters"])}}
    except ValueError:
        return None
    return dict(tool)


def read_calls(value: Any, name: str) -> list[Fields] | Reject:
    """Return the calls of an answer in one form, arguments as objects. `name` is their field."""
    try:
        calls = from_json(value)
    except ValueError as error:
        fix = 'write {"name": …, "arguments": {…}}, or make it an answer in plain text'
        return Reject("D012", f"the call in '{name}' is no JSON ({error})", fix=fix)
    read = []
    for call in calls if isinstance(calls, list) else [calls]:
        one = _call(call)
        if isinstance(one, Reject):
            return one
        read.append(one)
    return read


ARGUMENTS = ("arguments", "parameters", "args", "input")
RESULTS = ("output", "result", "response", "tool_output", "tool_response")
"""Members under which some logs keep a call's result inside of the call."""


def _call(value: Any) -> Fields | Reject:
    function = value.get("function", value.get("custom", value)) if isinstance(value, dict) else None
    if isinstance(function, str):
        function = {**value, "name": function, "function": None}
    named = next((key for key in ("name", "toolName", "tool_name") if isinstance((function or {}).get(key), str)), "")
    if not isinstance(function, dict) or not named:
        return Reject("D012", "a tool call has no name", fix='write {"name": …, "arguments": {…}}')
    given = [key for key in ARGUMENTS if function.get(key) is not None]
    full = [key for key in given if not is_empty(function[key])] or given
    if len(full) > 1 and any(function[key] != function[full[0]] for key in full):
        return Reject("D012", f"the call has arguments in '{full[0]}' and in '{full[1]}'", fix="keep one of the two")
    if held := next((key for one in (function, value) for key in RESULTS if not is_empty(one.get(key))), ""):
        what = f"the call holds its own result ('{held}')"
        return Reject("D012", what, fix='write the result as a turn of its own: {"role": "tool", "content": "…"}')
    arguments = _arguments(function[full[0]] if full else None)
    if isinstance(arguments, Reject):
        return arguments
    apart = (named, *ARGUMENTS, "id", "type", "function")
    rest = {key: part for key, part in function.items() if key not in apart and part is not None}
    identity = next((value[key] for key in ("id", "toolCallId", "call_id") if value.get(key) is not None), None)
    known = {"id": identity} if identity is not None else {}
    if function is not value and "function" not in function:
        known |= {key: part for key, part in value.items() if key not in NOT_BESIDE and part is not None}
    return {**known, "type": "function", "function": {"name": function[named], "arguments": arguments, **rest}}


NOT_BESIDE = ("id", "type", "function", "custom", "toolCallId", "call_id")


def _arguments(value: Any) -> Any:
    if is_empty(value):
        return {}
    try:
        arguments = from_json(value)
    except ValueError as error:
        return Reject("D012", f"the call's arguments are no JSON ({error})", fix="write the arguments as an object")
    if not isinstance(arguments, dict):
        what = f"the call's arguments are {kind_of(arguments)}, not an object"
        return Reject("D012", what, fix="write the arguments as an object")
    # a text was written by the model, nulls and all; only objects have been through Arrow
    return without_null_members(arguments) if isinstance(value, dict) else arguments
