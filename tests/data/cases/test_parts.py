"""Messages in content parts (OpenAI, Anthropic, Bedrock, Gemini) give the ids of the same talk in plain fields."""

from pathlib import Path
from typing import Any

import pytest

import made_data as made
from lorafit.data import parse_rows
from lorafit.errors import DataError
from template_shapes import template_of

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOL = {"type": "function", "function": {"name": "weather", "description": "w", "parameters": SCHEMA}}
CALL = {"id": "t1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Lima"}}}
ASK = {"role": "user", "content": "Weather?"}
PLAIN: dict[str, Any] = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        ASK,
        {"role": "assistant", "content": "Let me see.", "reasoning_content": "A call.", "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "t1", "content": "21 C"},
        {"role": "assistant", "content": "It is warm."},
    ],
    "tools": [TOOL],
}
ANTHROPIC: dict[str, Any] = {
    "system": [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}],
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "Weather?"}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "A call.", "signature": "x"},
                {"type": "text", "text": "Let me see."},
                {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Lima"}},
            ],
        },
        {
            "role": "user",
            "content": [{"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "21 C"}]}],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "It is warm."}]},
    ],
    "tools": [{"name": "weather", "description": "w", "input_schema": SCHEMA}],
}
BEDROCK: dict[str, Any] = {
    "system": [{"text": "Be brief."}],
    "messages": [
        {"role": "user", "content": [{"text": "Weather?"}]},
        {
            "role": "assistant",
            "content": [
                {"text": "Let me see."},
                {"toolUse": {"toolUseId": "t1", "name": "weather", "input": {"city": "Lima"}}},
            ],
            "reasoning": "A call.",
        },
        {"role": "user", "content": [{"toolResult": {"toolUseId": "t1", "content": [{"text": "21 C"}]}}]},
        {"role": "assistant", "content": [{"text": "It is warm."}]},
    ],
    "tools": [{"toolSpec": {"name": "weather", "description": "w", "inputSchema": {"json": SCHEMA}}}],
}
GEMINI: dict[str, Any] = {
    "systemInstruction": {"role": "system", "parts": [{"text": "Be brief."}]},
    "messages": [
        {"role": "user", "parts": [{"text": "Weather?"}]},
        {
            "role": "model",
            "parts": [
                {"text": "A call.", "thought": True},
                {"text": "Let me see."},
                {"functionCall": {"id": "t1", "name": "weather", "args": {"city": "Lima"}}},
            ],
        },
        {"role": "user", "parts": [{"functionResponse": {"id": "t1", "response": "21 C"}}]},
        {"role": "model", "parts": [{"text": "It is warm."}]},
    ],
    "tools": [{"functionDeclarations": [{"name": "weather", "description": "w", "parameters": SCHEMA}]}],
}


@pytest.mark.parametrize("shape", ["qwen2_5", "qwen3", "harmony", "gemma4"])
def test_the_same_talk_in_parts_gives_the_same_ids(tmp_path: Path, shape: str) -> None:
    template = template_of(tmp_path, shape)
    rows = [template.encode(parse_rows([row])[0]) for row in (PLAIN, ANTHROPIC, BEDROCK, GEMINI)]
    assert len(rows[0].ids) > 20
    assert len({(tuple(row.ids), tuple(row.mask)) for row in rows}) == 1


def test_what_a_user_says_beside_a_tools_result_follows_it() -> None:
    results = [
        {"type": "tool_result", "tool_use_id": "t1", "content": "21 C", "is_error": True},
        {"type": "text", "text": "And?"},
    ]
    calls = {"role": "assistant", "content": [{"type": "tool_use", "id": "t1", "name": "weather", "input": {}}]}
    talk = [ASK, calls, {"role": "user", "content": results}, {"role": "assistant", "content": "Warm."}]
    turns = parse_rows([{"messages": talk}])[0].turns
    assert [(turn.role, turn.content) for turn in turns[2:]] == [
        ("tool", "21 C"), ("user", "And?"), ("assistant", "Warm.")
    ]  # fmt: skip
    assert turns[2].extra == {"tool_call_id": "t1", "is_error": True}


def test_a_refusal_is_what_the_assistant_says() -> None:
    for content in (None, "", [{"type": "refusal", "refusal": "I cannot."}]):
        answer = {"role": "assistant", "content": content, "refusal": "I cannot." if not content else None}
        assert parse_rows([{"messages": [ASK, answer]}])[0].response == "I cannot."


IMAGES: list[Any] = [
    {"type": "image_url", "image_url": {}}, {"text": "what?", "image": "x.png"}, {"inlineData": {"data": "x"}},
    {"type": "text", "text": "what?", "image": "x.png"}, {"type": "input_audio", "input_audio": {}}, 7, None,
]  # fmt: skip


@pytest.mark.parametrize("part", IMAGES, ids=str)
def test_a_part_that_is_not_text_is_an_error_at_its_turn(part: Any) -> None:
    with pytest.raises(DataError, match=r"row:1: turn 1: .*not text"):
        parse_rows([{"messages": [{"role": "user", "content": [part]}, {"role": "assistant", "content": "a"}]}])


@pytest.mark.parametrize("flag", [{"mask": 1}, {"masked": True}, {"ignore": False}, {"train_detail": [{}]}], ids=str)
def test_a_flag_of_unclear_sense_is_an_error_at_its_turn(flag: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"turn 2: .*seems to be a loss flag.*weight"):
        parse_rows([{"messages": [ASK, {"role": "assistant", "content": "a", **flag}]}])


@pytest.mark.parametrize("flag", [{"weight": 0}, {"train": False}, {"loss": 0.0}, {"label": False}], ids=str)
def test_a_row_that_says_it_is_not_to_be_learnt_is_an_error_and_can_be_dropped(
    tmp_path: Path, flag: dict[str, Any]
) -> None:
    rows = [{"prompt": "a", "completion": "b", **flag}, {"prompt": "c", "completion": "d"}]
    result = made.prepared(made.write(tmp_path / "rows.jsonl", rows), holdout=0.0, on_bad="drop")
    assert f"'{next(iter(flag))}' says that its answer is not to be learnt" in made.found(result, "D038").message
    assert [result.train.record(place).response for place in range(len(result.train))] == ["d"]
