# ruff: noqa: E501
"""A third round of files as other tools write them: read like the plain row that says the same, or an error that says what is lost."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import made_data as made
from lorafit.data import Template, parse_rows
from lorafit.data.checks.rows import token_checks
from lorafit.errors import DataError

Row = dict[str, Any]
ASK, SAY = {"role": "user", "content": "ask"}, {"role": "assistant", "content": "say"}
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Lima"}}}
CALLED = {"role": "assistant", "content": "", "tool_calls": [CALL]}
FOUND = {"role": "tool", "content": "21 C"}
PLAIN: Row = {"messages": [ASK, SAY]}
KEPT: Row = {"messages": [ASK, {**SAY, "weight": 0}, ASK, SAY]}
THOUGHT: Row = {"messages": [ASK, {**SAY, "reasoning_content": "Think."}]}
WITH_SYSTEM: Row = {"system": "Be brief.", "messages": [ASK, SAY]}
WITH_TOOLS: Row = {"tools": [TOOL], "messages": [ASK, SAY]}
CALLING: Row = {"messages": [ASK, CALLED, FOUND, SAY]}


def answers(**more: Any) -> Row:
    return {"messages": [ASK, {**SAY, **more}]}


def calling(turn: Row, result: Row = FOUND) -> Row:
    return {"messages": [ASK, turn, result, SAY]}


def parts(*found: Any) -> Row:
    return {"messages": [ASK, {"role": "assistant", "content": list(found)}]}


def langchain(kind: str, content: str) -> Row:
    return {"lc": 1, "type": "constructor", "id": ["langchain", "schema", kind], "kwargs": {"content": content}}


SAME: dict[str, tuple[Row, Row]] = {
    # names in other capitals, with and without underscores
    "Alpaca in capitals": ({"Instruction": "a", "Input": "b", "Output": "c"}, {"instruction": "a", "input": "b", "output": "c"}),
    "Input alone": ({"instruction": "a", "Input": "b", "output": "c"}, {"instruction": "a", "input": "b", "output": "c"}),
    "Messages": ({"Messages": [ASK, SAY]}, PLAIN),
    "Role and Content": ({"messages": [{"Role": "user", "Content": "ask"}, {"Role": "assistant", "Content": "say"}]}, PLAIN),
    "System": ({"System": "Be brief.", "messages": [ASK, SAY]}, WITH_SYSTEM),
    "systemPrompt": ({"systemPrompt": "Be brief.", "messages": [ASK, SAY]}, WITH_SYSTEM),
    "Tools": ({"Tools": [TOOL], "messages": [ASK, SAY]}, WITH_TOOLS),
    "available_tools": ({"available_tools": [TOOL], "messages": [ASK, SAY]}, WITH_TOOLS),
    "toolConfig": ({"toolConfig": {"tools": [{"toolSpec": {"name": "weather", "inputSchema": {"json": SCHEMA}}}]}, "messages": [ASK, SAY]}, WITH_TOOLS),
    "Train": ({"messages": [ASK, {**SAY, "Train": False}, ASK, SAY]}, KEPT),
    "lossMask": ({"messages": [ASK, {**SAY, "lossMask": 0}, ASK, SAY]}, KEPT),
    "roles with blanks": ({"messages": [{"role": "User ", "content": "ask"}, {"role": "Assistant", "content": "say"}]}, PLAIN),
    "sender": ({"messages": [{"sender": "human", "text": "ask"}, {"sender": "assistant", "text": "say"}]}, PLAIN),
    "author": ({"messages": [{"author": "user", "content": "ask"}, {"author": "bot", "content": "say"}]}, PLAIN),
    # lists of turns in other forms
    "contents": ({"contents": [{"role": "user", "parts": [{"text": "ask"}]}, {"role": "model", "parts": [{"text": "say"}]}]}, PLAIN),
    "conversation": ({"conversation": [ASK, SAY]}, PLAIN),
    "columns": ({"messages": {"role": ["user", "assistant"], "content": ["ask", "say"]}}, PLAIN),
    "JSON twice": ({"messages": json.dumps(json.dumps([ASK, SAY]))}, PLAIN),
    "elements in JSON": ({"messages": [json.dumps(ASK), json.dumps(SAY)]}, PLAIN),
    "a list in a list": ({"messages": [[ASK, SAY]]}, PLAIN),
    "pairs": ({"messages": [["user", "ask"], ["assistant", "say"]]}, PLAIN),
    "LangChain's dump": ({"messages": [langchain("HumanMessage", "ask"), langchain("AIMessage", "say")]}, PLAIN),
    "LangChain's dicts": ({"messages": [{"type": "human", "data": {"content": "ask"}}, {"type": "ai", "data": {"content": "say"}}]}, PLAIN),
    "LangChain's extras": (calling({"type": "ai", "content": "", "additional_kwargs": {"tool_calls": [CALL]}}), CALLING),
    # texts in other forms
    "Assistants": (parts({"type": "text", "text": {"value": "say", "annotations": []}}), PLAIN),
    "content in a part": (parts({"type": "text", "content": "say"}), PLAIN),
    "content as an object": (answers(content={"content_type": "text", "parts": ["say"]}), PLAIN),
    # reasoning
    "reasoningContent": (answers(reasoningContent="Think."), THOUGHT),
    "thought_process": (answers(thought_process="Think."), THOUGHT),
    "Mistral's": (parts({"type": "thinking", "thinking": [{"type": "text", "text": "Think."}], "closed": True}, {"type": "text", "text": "say"}), THOUGHT),
    "Bedrock's": (parts({"reasoningContent": {"reasoningText": {"text": "Think.", "signature": "x"}}}, {"text": "say"}), THOUGHT),
    "OpenAI's items": ({"messages": [ASK, {"type": "reasoning", "summary": [{"type": "summary_text", "text": "Think."}]}, {"type": "message", **SAY}]}, THOUGHT),
    "gpt-oss' channels": ({"messages": [ASK, {"role": "assistant", "channel": "analysis", "content": "Think."}, SAY]}, THOUGHT),
    # calls
    "one call": (calling({"role": "assistant", "content": "", "tool_call": {"name": "weather", "args": {"city": "Lima"}}}), CALLING),
    "toolCalls": (calling({"role": "assistant", "content": "", "toolCalls": [CALL["function"]]}), CALLING),
    "old and new form": (calling({**CALLED, "function_call": {"name": "weather", "arguments": '{"city": "Lima"}'}}), CALLING),
    "empty arguments beside full ones": (calling({**CALLED, "tool_calls": [{"name": "weather", "arguments": {}, "input": {"city": "Lima"}}]}), CALLING),
    "AI SDK": (calling({"role": "assistant", "content": [{"type": "tool-call", "toolName": "weather", "args": {"city": "Lima"}}]}, {"role": "tool", "content": [{"type": "tool-result", "result": "21 C"}]}), CALLING),
    "a result of another name": (calling(CALLED, {"role": "tool_output", "result": "21 C"}), CALLING),
    "Cohere's plan": (calling({**CALLED, "tool_plan": "Look."}), calling({**CALLED, "reasoning_content": "Look."})),
    # switches are no reasoning
    "Nemotron": ({"prompt": [ASK], "completion": "say", "reasoning": None}, PLAIN),
}  # fmt: skip


@pytest.mark.parametrize("case", SAME)
def test_another_form_is_the_same_record(case: str) -> None:
    row, plain = SAME[case]
    (one,), (other,) = parse_rows([row]), parse_rows([plain])
    drop = {"channel"}
    turns = [
        [
            (turn.role, turn.content, {k: v for k, v in turn.extra.items() if k not in drop}, turn.loss)
            for turn in record.turns
        ]
        for record in (one, other)
    ]
    assert (turns[0], one.system, one.tools) == (turns[1], other.system, other.tools)


ERRORS: dict[str, tuple[Row, str]] = {
    **{f"{name}={value}": (answers(**{name: value}), f"'{name}' seems to be a loss flag") for name, value in {
        "is_trained": False, "include_in_loss": False, "no_train": True, "mask_output": True, "loss_scale": 0.0, "train_on_eot": "false"}.items()},
    **{name: ({"messages": [ASK, SAY, ASK, SAY], name: [0, 1]}, f"'{name}' seems to be a loss flag") for name in ("train_mask", "assistant_masks", "turn_weights")},
    "kto_tag": ({"messages": [ASK, SAY], "kto_tag": False}, "flag 'kto_tag' says that its answer"),
    "a call with its result": (calling({**CALLED, "tool_calls": [{**CALL["function"], "output": "21 C"}]}), r"holds its own result \('output'\)"),
    "two arguments": (calling({**CALLED, "tool_calls": [{"name": "w", "arguments": {"a": 1}, "input": {"b": 2}}]}), "arguments in 'arguments' and in 'input'"),
    "a custom call": (calling({**CALLED, "tool_calls": [{"type": "custom", "custom": {"name": "code", "input": "print(1)"}}]}), "the call's arguments are no JSON"),
    "toolInvocations": (answers(toolInvocations=[{"toolName": "weather"}]), "'toolInvocations' seems to hold tools"),
    "tools of a user": ({"messages": [{**ASK, "tools": [TOOL]}, SAY]}, "'tools' seems to hold tools"),
    "a column of tools": ({"prompt": "ask", "completion": "say", "tool_list": [TOOL]}, "'tool_list' seems to hold tools"),
    "a user's thoughts": ({"messages": [{**ASK, "thinking": "Hm."}, SAY]}, "reasoning stands in a turn of the user"),
    "thoughts before a question": ({"messages": [{"type": "reasoning", "summary": [{"text": "Hm."}]}, ASK, SAY]}, "reasoning stands before a turn of the user"),
    "thoughts alone": ({"messages": [ASK, SAY, {"role": "thinking", "content": "Hm."}]}, "reasoning without an answer"),
    "encrypted thoughts": ({"messages": [ASK, {"type": "reasoning", "summary": [], "encrypted_content": "x"}, SAY]}, "the reasoning is encrypted"),
    "an attachment": ({"messages": [{**ASK, "attachments": [{"name": "a.txt"}]}, SAY]}, "more than text .'attachments'"),
    "an image's path": ({"prompt": "ask", "completion": "say", "image_path": "a.png"}, "'image_path' is not used"),
    "an image as a result": (calling(CALLED, {"role": "tool", "content": [{"type": "image", "source": {}}]}), r"turn 3: .*'image'"),
    "a switch": ({"prompt": [ASK], "completion": "say", "reasoning": "off"}, "holds 'off', a switch"),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_what_would_be_lost_is_an_error(case: str) -> None:
    row, says = ERRORS[case]
    with pytest.raises(DataError, match=says):
        parse_rows([row])


def test_masks_of_a_tokenizer_are_no_flags_of_the_turns() -> None:
    assert parse_rows([{**PLAIN, "attention_mask": [1, 1, 0], "special_tokens_mask": [1, 0]}])[0].response == "say"


def test_a_name_that_stands_in_two_spellings_is_not_guessed(tmp_path: Path) -> None:
    path = made.write(tmp_path / "a.jsonl", [{"instruction": "a", "Input": "b", "INPUT": "c", "output": "d"}])
    result = made.prepared(path, holdout=0.0)
    assert "INPUT, Input" in made.found(result, "D037").message


def test_sources_of_a_text_are_listed_as_not_used(tmp_path: Path) -> None:
    row = parts({"type": "text", "text": "say", "citations": [{"cited_text": "21"}]})
    found = made.found(made.prepared(made.write(tmp_path / "a.jsonl", [row]), holdout=0.0), "D037")
    assert "citations (of a turn)" in found.message


def test_a_switch_can_be_passed_by(tmp_path: Path) -> None:
    path = made.write(tmp_path / "a.jsonl", [{"prompt": [ASK], "completion": "say", "reasoning": "on"}])
    result = made.prepared(path, holdout=0.0, ignore=["D038"])
    assert [turn.reasoning for turn in result.train.record(0).turns] == ["", ""]


def test_maps_of_arrow_are_objects(tmp_path: Path) -> None:
    pairs = [[("role", "user"), ("content", "ask")], [("role", "assistant"), ("content", "say")]]
    kind = pa.list_(pa.map_(pa.string(), pa.string()))
    pq.write_table(pa.table({"messages": pa.array([pairs], kind)}), tmp_path / "a.parquet")
    rows = made.prepared(tmp_path / "a.parquet", holdout=0.0).train
    assert [(turn.role, turn.content) for turn in rows.record(0).turns] == [("user", "ask"), ("assistant", "say")]


@pytest.mark.parametrize(("text", "seen"), [("<Think>Hm.</Think>say", set()), ("<think>Hm. And", {"D056"})])
def test_thoughts_in_other_capitals_are_taken_out_and_open_ones_are_told(
    templates: dict[str, Template], text: str, seen: set[str]
) -> None:
    one = templates["qwen3"].encode(parse_rows([answers(content=text)])[0])
    assert {code for code, _ in token_checks(one)} - {"D055"} == seen
    if not seen:
        assert templates["qwen3"].encode(parse_rows([answers(reasoning="Hm.")])[0]).ids == one.ids


@pytest.mark.parametrize("end", ["\n\nHuman: Hi\n\nAssistant:", "Human: Hi\nAI: "])
def test_a_prompt_that_names_the_next_speaker_is_told(tmp_path: Path, end: str) -> None:
    path = made.write(tmp_path / "a.jsonl", [{"prompt": end, "completion": " Yo"}])
    assert "at the end of a prompt" in made.found(made.prepared(path, holdout=0.0), "D040").message


NO_FLAGS = {
    "training_id": 1, "weight_kg": 0.5, "trainStep": 0, "loss_type": 1, "train_loss": 0.31, "lossValue": 0.2, "maskName": "x",
    "training_epoch": 1, "weight_unit": 0, "model_weights_version": 1, "attention_mask": [1, 1], "metadata": {"loss": 0, "weight_kg": 1},
}  # fmt: skip
FLAGS = {
    "train_this": False,
    "lossMask2": 0,
    "turn_weight": 0.5,
    "is_trained_on": 1,
    "no_grad": True,
    "token_mask": [0, 1],
}


@pytest.mark.parametrize("name", [*NO_FLAGS, *FLAGS])
def test_a_name_that_only_holds_a_flags_word_is_no_flag(name: str) -> None:
    turn = {**SAY, name: {**NO_FLAGS, **FLAGS}[name]}
    if name in NO_FLAGS:
        assert parse_rows([{"messages": [ASK, turn]}])[0].turns[1].loss is None
        return
    with pytest.raises(DataError, match="seems to be a loss flag"):
        parse_rows([{"messages": [ASK, turn]}])
