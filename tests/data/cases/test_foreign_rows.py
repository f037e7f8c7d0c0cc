# ruff: noqa: E501
"""Rows as other tools log and export them: read as they are, or told with a fix that is carried out here as printed."""

import contextlib
import io
import json
import shlex
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import made_data as made
from lorafit.data import Prepared
from lorafit.errors import DataError

Row = dict[str, Any]
U, A, NO = (
    {"role": "user", "content": "ask"},
    {"role": "assistant", "content": "say"},
    {"role": "assistant", "content": "no"},
)
S = {"role": "system", "content": "brief"}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
ITEM = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "say", "annotations": []}]}
ASKED = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "ask"}]}
TOLD, BRIEF = "user: ask|assistant: say", "system: brief|user: ask|assistant: say"
CALLED = 'user: ask|call: weather({"city": "Lima"})|tool: 21|assistant: say'
NAMED_CALL = {"name": "weather", "arguments": '{"city": "Lima"}'}


def lang(kind: str, content: str) -> Row:
    return {
        "lc": 1,
        "type": "constructor",
        "id": ["langchain", "schema", "messages", kind],
        "kwargs": {"content": content},
    }


LOGS: dict[str, tuple[Row, str]] = {
    "Langfuse turns": ({"id": "t", "input": [S, U], "output": A}, BRIEF),
    "Langfuse text": ({"id": "t", "input": [S, U], "output": "say"}, BRIEF),
    "Langfuse request": ({"id": "t", "input": {"messages": [S, U], "tools": [TOOL]}, "output": A}, BRIEF + "|tools: weather"),
    "Langfuse request, text": ({"input": {"messages": [U]}, "output": "say"}, TOLD),
    "Langfuse JSON": ({"input": json.dumps([S, U]), "output": json.dumps(A)}, BRIEF),
    "Langfuse item": ({"input": {"question": "ask"}, "expectedOutput": {"answer": "say"}}, TOLD),
    "Langfuse item, more": ({"input": {"question": "ask", "lang": "en"}, "expectedOutput": {"answer": "say"}}, TOLD),
    "Langfuse item, turns": ({"input": [U], "expected_output": A}, TOLD),
    "Responses": ({"instructions": "brief", "input": [ASKED], "output": [ITEM], "tools": [{"type": "function", "name": "weather", "parameters": {}}]}, BRIEF + "|tools: weather"),
    "Responses reasoning": ({"input": "ask", "output": [{"type": "reasoning", "summary": [{"type": "summary_text", "text": "hm"}]}, ITEM]}, "user: ask|thinks: hm|assistant: say"),
    "Responses calls": ({"input": [U, {"type": "function_call", "call_id": "c", **NAMED_CALL}, {"type": "function_call_output", "call_id": "c", "output": "21"}, ITEM]}, CALLED),
    "Responses log": ({"request": {"instructions": "brief", "input": [ASKED]}, "response": {"output": [ITEM]}}, BRIEF),
    "evals": ({"input": [S, U], "ideal": "say"}, BRIEF),
    "evals list": ({"input": [S, U], "ideal": ["say", "Say."]}, BRIEF),
    "evals text": ({"input": "ask", "ideal": ["say"]}, TOLD),
    "BFCL": ({"id": "simple_0", "question": [[U]], "function": [TOOL["function"]], "ground_truth": [{"weather": {"city": ["Lima", "Lima, Peru"], "unit": ["", "C"]}}]}, 'user: ask|call: weather({"city": "Lima"})|tools: weather'),
    "Cohere": ({"message": "ask", "chat_history": [{"role": "USER", "message": "hi"}, {"role": "CHATBOT", "message": "ho"}], "text": "say", "preamble": "brief"}, "system: brief|user: hi|assistant: ho|user: ask|assistant: say"),
    "Cohere fine-tuning": ({"messages": [{"role": "System", "content": "brief"}, {"role": "User", "content": "ask"}, {"role": "Chatbot", "content": "say"}]}, BRIEF),
    "Anthropic": ({"system": "brief", "messages": [U, {"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "weather", "input": {"city": "Lima"}}]}, {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": "21"}]}, A]}, "system: brief|" + CALLED),
    "Anthropic log": ({"request": {"system": "brief", "messages": [U]}, "response": {"type": "message", "role": "assistant", "content": [{"type": "text", "text": "say"}]}}, BRIEF),
    "Gemini": ({"contents": [{"role": "user", "parts": [{"text": "ask"}]}, {"role": "model", "parts": [{"functionCall": {"name": "weather", "args": {"city": "Lima"}}}]}, {"role": "function", "parts": [{"functionResponse": {"name": "weather", "response": 21}}]}, {"role": "model", "parts": [{"text": "say"}]}]}, CALLED),
    "Vertex batch": ({"request": {"systemInstruction": {"parts": [{"text": "brief"}]}, "contents": [{"role": "user", "parts": [{"text": "ask"}]}]}, "response": {"candidates": [{"content": {"role": "model", "parts": [{"text": "say"}]}}]}}, BRIEF),
    "Vertex chat": ({"context": "brief", "messages": [{"author": "user", "content": "ask"}, {"author": "bot", "content": "say"}]}, BRIEF),
    "Vertex text": ({"input_text": "ask", "output_text": "say"}, TOLD),
    "Bedrock": ({"schemaVersion": "bedrock-conversation-2024", "system": [{"text": "brief"}], "messages": [{"role": "user", "content": [{"text": "ask"}]}, {"role": "assistant", "content": [{"text": "say"}]}]}, BRIEF),
    "Bedrock batch": ({"recordId": "1", "modelInput": {"system": "brief", "messages": [U]}, "modelOutput": A}, BRIEF),
    "Mistral": ({"messages": [U, {"role": "assistant", "content": "", "tool_calls": [{"id": "abcdefghi", "function": NAMED_CALL}]}, {"role": "tool", "name": "weather", "content": "21", "tool_call_id": "abcdefghi"}, A]}, CALLED),
    "LangChain": ({"messages": [{"type": "human", "content": "ask"}, {"type": "ai", "content": "", "additional_kwargs": {"tool_calls": [{"id": "c", "type": "function", "function": NAMED_CALL}]}, "tool_calls": [{"name": "weather", "args": {"city": "Lima"}, "id": "c", "type": "tool_call"}]}, {"type": "tool", "content": "21", "tool_call_id": "c"}, {"type": "ai", "content": "say"}]}, CALLED),
    "LangChain pairs": ({"messages": [["human", "ask"], ["ai", "say"]]}, TOLD),
    "LangChain answer": ({"input": [{"type": "human", "content": "ask"}], "output": {"type": "ai", "content": "say"}}, TOLD),
    "LangSmith texts": ({"inputs": {"question": "ask"}, "outputs": {"answer": "say"}}, TOLD),
    "LangSmith run": ({"inputs": {"messages": [[lang("HumanMessage", "ask")]]}, "outputs": {"generations": [[{"text": "say", "message": lang("AIMessage", "say")}]]}}, TOLD),
    "LangSmith example": ({"id": "e", "inputs": {"messages": [S, U]}, "outputs": {"message": A}}, BRIEF),
    "tools as JSON texts": ({"messages": [U, A], "tools": [json.dumps(TOOL)]}, TOLD + "|tools: weather"),
    "an instruction of turns": ({"instruction": json.dumps([S, U]), "output": "say"}, BRIEF),
    "reasoning beside turns": ({"prompt": [U], "completion": [A], "reasoning": "hm"}, "user: ask|thinks: hm|assistant: say"),
}  # fmt: skip
PAIRS: dict[str, tuple[Row | list[Row], str]] = {
    "winner": ([{"prompt": "ask", "response_a": "say", "response_b": "no", "winner": "a"}, {"prompt": "ask", "response_a": "no", "response_b": "say", "winner": "B"}, {"prompt": "ask", "response_a": "x", "response_b": "y", "winner": "tie"}], f"{TOLD}\n{TOLD}"),
    "winner model": ({"prompt": "ask", "model_a": "x", "model_b": "y", "response_a": "no", "response_b": "say", "winner": "model_b"}, TOLD),
    "arena": ({"winner": "model_a", "conversation_a": [U, A], "conversation_b": [U, NO], "turn": 1}, TOLD),
    "preference": ([{"question": "ask", "answer_1": "say", "answer_2": "no", "preference": 1}, {"question": "ask", "answer_1": "no", "answer_2": "say", "preference": 2.0}], f"{TOLD}\n{TOLD}"),
    "Beaver": ({"prompt": "ask", "response_0": "no", "response_1": "say", "better_response_id": 1}, TOLD),
    "AlpacaFarm": ({"instruction": "ask", "input": "", "output_1": "no", "output_2": "say", "preference": 2}, TOLD),
    "no verdict": ({"question": "ask", "response_j": "say", "response_k": "no"}, TOLD),
    "chosen": ({"prompt": "ask", "chosen": "say", "rejected": "no"}, TOLD),
    "chosen turns": ({"prompt": "ask", "chosen": [U, A], "rejected": [U, NO]}, TOLD),
    "chosen beside an answer": ({"prompt": "ask", "response": "no", "chosen": "say", "rejected": "no"}, TOLD),
    "KTO": ([{"prompt": "ask", "completion": "say", "label": True}, {"prompt": "ask", "completion": "no", "label": False}], TOLD),
    "KTO numbers": ([{"prompt": "ask", "completion": "say", "label": 1}, {"prompt": "ask", "completion": "no", "label": 0}, {"prompt": "ask", "completion": "nay", "label": 0}], TOLD),
    "KTO texts": ([{"prompt": "ask", "completion": "say", "label": "1"}, {"prompt": "ask", "completion": "no", "label": "0"}, {"prompt": "ask", "completion": "nay", "label": "0"}], TOLD),
    "ms-swift": ([{"messages": [U, A], "label": 1}, {"messages": [U, NO], "label": 0}, {"messages": [U, {**NO, "content": "nay"}], "label": 0}], TOLD),
    "accepted": ([{"prompt": "ask", "response": "say", "accepted": True}, {"prompt": "ask", "response": "no", "accepted": False}], TOLD),
    "rejected as a flag": ([{"prompt": "ask", "response": "say", "rejected": False}, {"prompt": "ask", "response": "no", "rejected": True}], TOLD),
}  # fmt: skip


def said(result: Prepared) -> str:
    """Every row in a line, its parts between bars."""
    lines = []
    for record in (result.train.record(place) for place in range(len(result.train))):
        parts = [f"system: {record.system}"] if record.system else []
        for turn in record.turns:
            parts += [f"thinks: {turn.reasoning}"] if turn.reasoning else []
            parts += [
                f"call: {call['function']['name']}({json.dumps(call['function']['arguments'])})" for call in turn.calls
            ]
            parts += [f"{turn.role}: {turn.content}"] if turn.content else []
        parts += [f"tools: {tool['function']['name']}" for tool in record.tools]
        lines.append("|".join(parts))
    return "\n".join(lines)


def carried_out(fix: str, path: Path) -> tuple[Path, dict[str, Any]]:
    """Do what a fix says: the file to read then, and its settings."""
    words = shlex.split(fix)
    if "python" in words:
        code, out = words[words.index("python") + 2], io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.chdir(path.parent):
            exec(code, {})
        path = made.write(path.parent / "rows.jsonl", out.getvalue().encode())
    maps = dict(word.split("=", 1) for flag, word in pairwise(words) if flag == "--map")
    drops = {"on_bad": "drop"} if "--on-bad" in words else {}
    assert "python" in words or maps or drops, f"no way on: {fix}"
    return path, {**({"map": maps} if maps else {}), **drops}


def read_through(path: Path) -> str:
    """What is read of a file once every fix is done."""
    settings: dict[str, Any] = {}
    for _ in range(3):
        try:
            result = made.prepared(path, holdout=0.0, ignore=["D033", "D037", "D030"], **settings)
        except DataError as error:
            path, settings = carried_out(str(error.fix), path)
            continue
        bad = [finding for finding in result.findings if finding.severity.value == "error" and finding.code != "D035"]
        if not bad:
            return said(result)
        path, more = carried_out(bad[0].fix, path)
        settings |= more
    raise AssertionError("three fixes, and still an error")


def rows_of(given: Row | Sequence[Row]) -> list[Row]:
    return [given] if isinstance(given, dict) else list(given)


UNSAID = {
    "the model's name": {"prompt": "ask", "response_a": "say", "response_b": "no", "winner": "gemma"},
    "labels": {"prompt": "ask", "response_1": "say", "response_2": "no", "labels": 1},
    "counted from 0": {"prompt": "ask", "answer_1": "say", "answer_2": "no", "preference": 0},
}
PLAIN = {
    "classes": [{"prompt": f"ask {n}", "completion": ("bad", "good")[n % 2], "label": n % 2} for n in range(4)],
    "many classes": [{"prompt": f"ask {n}", "completion": f"say {n}", "label": n} for n in range(4)],
    "a copy of the better turns": [
        {"messages": [U, A], "prompt": "ask", "chosen": [U, A], "rejected": [U, NO], "score_chosen": 9}
    ],
    "a worse answer beside": [{"messages": [U, A], "rejected_response": "no"}],
    "scores": [{"prompt": "ask", "response": "say", "helpfulness": 0, "rejected_by": "nobody", "best_of": 4}],
    "options": [{"prompt": "ask", "response": "say", "chosen": True, "preference": "none", "thumbs": "up"}],
}


@pytest.mark.parametrize("case", UNSAID)
def test_no_answer_is_picked_where_the_verdict_is_unclear(tmp_path: Path, case: str) -> None:
    with pytest.raises(DataError) as caught:
        made.prepared(made.write(tmp_path / "pairs.jsonl", [UNSAID[case]]), holdout=0.0)
    assert "python" not in str(caught.value.fix) and "--map" not in str(caught.value.fix)


@pytest.mark.parametrize("case", PLAIN)
def test_what_is_no_judgement_is_no_error(tmp_path: Path, case: str) -> None:
    result = made.prepared(made.write(tmp_path / "rows.jsonl", PLAIN[case]), holdout=0.0)
    assert "D038" not in made.codes(result) and len(result.train) == len(PLAIN[case])


@pytest.mark.parametrize("case", LOGS)
def test_a_log_is_read_or_its_fix_works(tmp_path: Path, case: str) -> None:
    row, expected = LOGS[case]
    assert read_through(made.write(tmp_path / "log.jsonl", rows_of(row))) == expected


@pytest.mark.parametrize("case", PAIRS)
def test_of_preference_data_only_better_answers_are_taught(tmp_path: Path, case: str) -> None:
    given, expected = PAIRS[case]
    path = made.write(tmp_path / "pairs.jsonl", rows_of(given))
    with contextlib.suppress(DataError):
        first = made.prepared(path, holdout=0.0)
        assert "no" not in said(first).replace("|", " ").split() and made.codes(first) & {"D038"}
    assert read_through(path) == expected
