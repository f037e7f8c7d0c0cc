# ruff: noqa: E501
"""The collected cases: for each row, on every shape of chat template, the very words that are supervised.

`TAUGHT` says how a shape writes one answer. A case gives its answers, and which shapes refuse the row with which code;
`WHOLE` has the whole text of each case on one shape, prompt and all, the supervised part in ⟦ ⟧.
"""

import json
from collections.abc import Mapping
from typing import Any

import pytest

from lorafit.data import Template, parse_rows
from lorafit.data.checks.findings import CODES
from lorafit.data.checks.rows import text_checks, token_checks
from template_shapes import SHAPES

Row = Mapping[str, Any]
ASK = {"role": "user", "content": "Weather in Lima?"}
CALL: dict[str, Any] = {
    "id": "call00001",
    "type": "function",
    "function": {"name": "weather", "arguments": {"city": "Lima"}},
}
AS_TEXT = {**CALL, "function": {"name": "weather", "arguments": '{"city": "Lima"}'}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
FOUND = {"role": "tool", "tool_call_id": "call00001", "content": "21 C"}
SAY = {"role": "assistant", "content": "It is 21 C."}


def turns(*contents: str, first: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
    """User and assistant in turn; `first` goes into the first answer."""
    made = [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(contents)]
    made[1] |= first or {}
    return made


def asks(call: Mapping[str, Any], content: str | None = "") -> dict[str, Any]:
    return {"role": "assistant", "content": content, "tool_calls": [call]}


def spoken(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same turns as ShareGPT writes them."""
    names = {"user": "human", "assistant": "gpt"}
    kept = [{key: value for key, value in turn.items() if key not in ("role", "content")} for turn in messages]
    return [{"from": names[turn["role"]], "value": turn["content"], **more} for turn, more in zip(messages, kept)]


TAUGHT = {
    "llama3": "{}<|eot_id|>", "qwen2_5": "{}<|im_end|>", "qwen3": "<think>\n\n</think>\n\n{}<|im_end|>", "mistral": " {}</s>",
    "gemma": "{}<end_of_turn>", "gemma2": "{}<end_of_turn>", "gemma4": "{}<turn|>", "phi3": "{}<|end|>", "phi3old": "{}<|end|>",
    "phi4": "{}<|im_end|>", "r1": None, "harmony": "<|channel|>final<|message|>{}<|return|>", "chatml": "{}<|im_end|>",
    "thinkspecial": "{}<|im_end|>", "smollm3": "{}<|im_end|>", "granite": "{}<|end_of_text|>", "llama2": " {} </s>",
    "qwen35": "</think>\n\n{}<|im_end|>", "deepseek": "{}</s>",
}  # fmt: skip
"""How each shape writes an answer; None for R1's, whose prompt ends with a <think> that no row here has (D026)."""

LAST_ONLY = {"qwen3", "harmony"}
"""Shapes that write earlier answers otherwise than the last one: D025 says what is lost."""
NO_SYSTEM = {"gemma": "D024", "gemma2": "D024", "phi3old": "D039", "deepseek": "D039"}
NO_TOOL_TURN = {
    "gemma": "D024",
    "gemma2": "D024",
    "llama2": "D024",
    "mistral": "D024",
    "phi3": "D039",
    "phi3old": "D039",
    "phi4": "D039",
    "harmony": "D024",
}

PLAIN = {"messages": turns("2+2?", "4")}
SYSTEM = {"messages": [{"role": "system", "content": "Answer in French."}, *turns("Hi", "Salut")]}

Case = tuple[Row, list[str], Mapping[str, str]]
CASES: dict[str, Case] = {
    "plain": (PLAIN, ["4"], {}),
    # A: flags
    "weight": ({"messages": turns("Capital of Peru?", "Bogota.", "Sure?", "Sorry, Lima.", first={"weight": 0})}, ["Sorry, Lima."], {}),
    "axo": ({"conversations": spoken(turns("Capital of Peru?", "Bogota.", "Sure?", "Lima.", first={"train": False}))}, ["Lima."], {}),
    "swift": ({"messages": turns("Capital of Peru?", "Bogota.", "Sure?", "Lima.", first={"loss": False})}, ["Lima."], {}),
    "trlprompt": ({"prompt": turns("Hi", "Hello", "2+2?"), "completion": [{"role": "assistant", "content": "4"}]}, ["4"], {}),
    # B: fields
    "history": ({"instruction": "And its capital?", "input": "", "output": "Lima.", "history": [["Name a country in the Andes.", "Peru."]]}, ["Peru.", "Lima."], {}),
    "dolly": ({"instruction": "How tall is it?", "context": "The tower is 31 m tall.", "response": "31 m.", "category": "closed_qa"}, ["31 m."], {}),
    "orca": ({"system_prompt": "Answer like a pirate.", "instruction": "Hi", "output": "Arr."}, ["Arr."], NO_SYSTEM),
    "promptinput": ({"prompt": "Translate to German:", "input": "good morning", "response": "guten Morgen"}, ["guten Morgen"], {}),
    # C: what templates leave out
    "system": (SYSTEM, ["Salut"], NO_SYSTEM),
    "developer": ({"messages": [{"role": "developer", "content": "Answer in French."}, *turns("Hi", "Salut")]}, ["Salut"], NO_SYSTEM),
    "tool": ({"messages": [*turns("Weather in Lima?", "CALL weather(Lima)"), {"role": "tool", "content": "21 C"}, SAY]}, ["CALL weather(Lima)", "It is 21 C."], NO_TOOL_TURN),
    "function": ({"messages": [*turns("Weather in Lima?", "CALL weather(Lima)"), {"role": "function", "name": "weather", "content": "21 C"}, SAY]}, ["CALL weather(Lima)", "It is 21 C."], NO_TOOL_TURN),
    "ipython": ({"messages": [*turns("2+2?", "CALL 2+2"), {"role": "ipython", "content": "4"}, {"role": "assistant", "content": "4"}]}, ["CALL 2+2", "4"], NO_TOOL_TURN),
    # I and L: several answers
    "multi": ({"messages": turns("2+2?", "4", "3+3?", "6")}, ["4", "6"], {}),
    # K: spellings
    "fromvalue_in_messages": ({"messages": spoken(turns("2+2?", "4"))}, ["4"], {}),
    "ai_human": ({"messages": [{"role": "human", "content": "2+2?"}, {"role": "ai", "content": "4"}]}, ["4"], {}),
    "parts": ({"messages": [{"role": "user", "content": [{"type": "text", "text": "What is "}, {"type": "text", "text": "2+2?"}]}, {"role": "assistant", "content": [{"type": "text", "text": "4"}]}]}, ["4"], {}),
    "resp_parts": ({"messages": [{"role": "user", "content": [{"type": "input_text", "text": "2+2?"}]}, {"role": "assistant", "content": [{"type": "output_text", "text": "4"}]}]}, ["4"], {}),
    "gemini": ({"messages": [{"role": "user", "parts": [{"text": "2+2?"}]}, {"role": "model", "parts": [{"text": "4"}]}]}, ["4"], {}),
    # N: blanks
    "trail": ({"prompt": "Complete:\ndef f(x):\n    ", "completion": "return x\n"}, ["return x"], {}),
    "emoji": ({"messages": turns("Grüße?", "👨‍👩‍👧‍👦 世界 été")}, ["👨‍👩‍👧‍👦 世界 été"], {}),
}  # fmt: skip

THOUGHT: dict[str, Row] = {
    name: {"messages": turns("17*3?", "51", first={name: "17*3 is 51 now."})}
    for name in ("reasoning", "thinking", "reasoning_content")
}
THINKS = {
    "qwen3": "<think>\n17*3 is 51 now.\n</think>\n\n51<|im_end|>",
    "qwen35": "17*3 is 51 now.\n</think>\n\n51<|im_end|>",
    "harmony": "<|channel|>analysis<|message|>17*3 is 51 now.<|end|><|start|>assistant<|channel|>final<|message|>51<|return|>",
}  # fmt: skip

CALLED = {
    "llama3": '{"name": "weather", "parameters": {"city": "Lima"}}<|eom_id|>',
    "mistral": '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Lima"}}]</s>',
    "qwen2_5": '<tool_call>\n{"name": "weather", "arguments": {"city": "Lima"}}\n</tool_call><|im_end|>',
    "qwen3": '<think>\n\n</think>\n\n<tool_call>\n{"name": "weather", "arguments": {"city": "Lima"}}\n</tool_call><|im_end|>',
    "gemma4": "<|tool_call>call:weather{city:Lima}<tool_call|><turn|>",
    "harmony": ' to=functions.weather<|message|>{"city": "Lima"}<|call|>',
    "qwen35": "</think>\n\n\n<function=weather><parameter=city>Lima</parameter></function><|im_end|>",
    "deepseek": '<call>weather:{"city": "Lima"}</s>',
}
"""How each shape writes a lone call; every other one shows nothing of it, which is D013 (R1's: D026)."""
CALLS: dict[str, Row] = {
    "toolobj": {"messages": [ASK, asks(CALL)], "tools": [TOOL]},
    "argstr": {"messages": [ASK, asks(AS_TEXT, None)], "tools": [TOOL]},
    "sgcalls": {"conversations": [ASK, asks(CALL)], "tools": [TOOL]},
    "sgtools": {"conversations": [{"from": "human", "value": "Weather in Lima?"}, {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Lima"}}'}], "tools": json.dumps([TOOL["function"]])},
    "sgtools2": {"conversations": [{"from": "human", "value": "Weather in Lima?"}, {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Lima"}}'}], "tools": [TOOL]},
    "xlam": {"query": "Weather in Lima?", "answers": '[{"name": "weather", "arguments": {"city": "Lima"}}]', "tools": json.dumps([TOOL["function"]])},
    "funccall": {"messages": [ASK, {"role": "assistant", "content": None, "function_call": {"name": "weather", "arguments": '{"city": "Lima"}'}}], "functions": [TOOL["function"]]},
    "nullargs": {"messages": [ASK, asks({**CALL, "function": {"name": "weather", "arguments": {"city": "Lima", "zone": None}}})], "tools": [{"type": "function", "function": {**TOOL["function"], "strict": None}}]},
}  # fmt: skip


HEAD = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
WHOLE = {
    "plain": HEAD + "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n⟦4<|im_end|>⟧\n",
    "weight": HEAD
    + "<|im_start|>user\nCapital of Peru?<|im_end|>\n<|im_start|>assistant\nBogota.<|im_end|>\n<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n⟦Sorry, Lima.<|im_end|>⟧\n",
    "axo": HEAD
    + "<|im_start|>user\nCapital of Peru?<|im_end|>\n<|im_start|>assistant\nBogota.<|im_end|>\n<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n⟦Lima.<|im_end|>⟧\n",
    "trlprompt": HEAD
    + "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n⟦4<|im_end|>⟧\n",
    "history": HEAD
    + "<|im_start|>user\nName a country in the Andes.<|im_end|>\n<|im_start|>assistant\n⟦Peru.<|im_end|>⟧\n<|im_start|>user\nAnd its capital?<|im_end|>\n<|im_start|>assistant\n⟦Lima.<|im_end|>⟧\n",
    "dolly": HEAD
    + "<|im_start|>user\nHow tall is it?\nThe tower is 31 m tall.<|im_end|>\n<|im_start|>assistant\n⟦31 m.<|im_end|>⟧\n",
    "orca": "<|im_start|>system\nAnswer like a pirate.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦Arr.<|im_end|>⟧\n",
    "promptinput": HEAD
    + "<|im_start|>user\nTranslate to German:\ngood morning<|im_end|>\n<|im_start|>assistant\n⟦guten Morgen<|im_end|>⟧\n",
    "developer": "<|im_start|>system\nAnswer in French.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦Salut<|im_end|>⟧\n",
    "parts": HEAD + "<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n⟦4<|im_end|>⟧\n",
    "trail": HEAD + "<|im_start|>user\nComplete:\ndef f(x):<|im_end|>\n<|im_start|>assistant\n⟦return x<|im_end|>⟧\n",
}
"""Of some cases the whole text on Qwen 2.5's shape, with what is supervised in ⟦ ⟧."""


def outcome(template: Template, row: Row) -> tuple[str, set[str]]:
    """(what is supervised, the codes that were seen) of one row."""
    record = parse_rows([row])[0]
    one = template.encode(record)
    taught = [token for token, kept in zip(one.ids, one.mask) if kept]
    seen = {code for code, _ in [*text_checks(record), *token_checks(one)]}
    return template.tokenizer.decode(taught, skip_special_tokens=False), seen


def rejecting(seen: set[str]) -> set[str]:
    return {code for code in seen if CODES[code].rejects}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("case", CASES)
def test_exactly_the_answers_are_supervised(templates: dict[str, Template], shape: str, case: str) -> None:
    row, answers, refused = CASES[case]
    form = TAUGHT[shape]
    taught, seen = outcome(templates[shape], row)
    if shape in refused or form is None:
        assert rejecting(seen) & {refused.get(shape, "D026"), "D026"}
        return
    last_only = shape in LAST_ONLY and len(answers) > 1
    assert taught == "".join(form.format(answer) for answer in (answers[-1:] if last_only else answers))
    assert ("D025" in seen) is last_only and not rejecting(seen)


@pytest.mark.parametrize("case", WHOLE)
def test_the_whole_row_has_these_ids(templates: dict[str, Template], case: str) -> None:
    template = templates["qwen2_5"]
    one = template.encode(parse_rows([CASES[case][0]])[0])
    before, *parts = WHOLE[case].replace("⟧", "⟦").split("⟦")
    pieces = [(before, False), *((part, place % 2 == 0) for place, part in enumerate(parts))]
    ids = [template.tokenizer.encode(text) for text, _ in pieces]
    assert one.ids == [token for piece in ids for token in piece]
    assert one.mask == [kept for (_, kept), piece in zip(pieces, ids) for _ in piece]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("case", THOUGHT)
def test_reasoning_is_supervised_or_told(templates: dict[str, Template], shape: str, case: str) -> None:
    taught, seen = outcome(templates[shape], THOUGHT[case])
    if shape in THINKS:
        assert (taught, seen - {"D028"}) == (THINKS[shape], set())
    else:
        form = TAUGHT[shape]
        assert "D027" in seen and (form is None or taught == form.format("51"))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("case", CALLS)
def test_a_call_is_supervised_as_the_template_writes_it_or_refused(
    templates: dict[str, Template], shape: str, case: str
) -> None:
    taught, seen = outcome(templates[shape], CALLS[case])
    form = CALLED.get(shape)
    if form is not None:
        assert taught == form and not rejecting(seen)
    else:
        assert rejecting(seen), f"{taught!r} is taught"
