"""What rows of other tools say reaches the ids on every shape of chat template, or its loss is told."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import made_data as made
from lorafit.data import Template, parse_rows
from lorafit.data.checks.rows import token_checks
from lorafit.errors import DataError
from template_shapes import SHAPES

Row = Mapping[str, Any]
SYSTEM_FREE = {"gemma", "gemma2"}
CALL = {
    "id": "call00001",
    "type": "function",
    "function": {"name": "weather", "arguments": {"city": "Lima", "days": 2}},
}
TEXT_CALL = {**CALL, "function": {"name": "weather", "arguments": '{"city": "Lima", "days": 2}'}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
ASK = {"role": "user", "content": "Weather in Lima?"}
FOUND = {"role": "tool", "name": "weather", "tool_call_id": "call00001", "content": "21 C"}
SAY = {"role": "assistant", "content": "It is warm."}


def encoded(template: Template, row: Row, mapped: Mapping[str, str] | None = None) -> tuple[list[int], str, set[str]]:
    """(ids, what is supervised, codes of what was seen) of one row."""
    one = template.encode(parse_rows([row], mapped)[0])
    taught = [token for token, kept in zip(one.ids, one.mask) if kept]
    return (
        one.ids,
        template.tokenizer.decode(taught, skip_special_tokens=False),
        {code for code, _ in token_checks(one)},
    )


def same(template: Template, *rows: Row) -> bool:
    """Whether the rows give the same ids and the same loss mask."""
    first, *others = [template.encode(parse_rows([row])[0]) for row in rows]
    return all((one.ids, one.mask, one.problems) == (first.ids, first.mask, first.problems) for one in others)


def talk(*contents: str, **flags: Any) -> list[dict[str, Any]]:
    """User and assistant in turn; `flags` of the first answer."""
    turns = [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(contents)]
    turns[1] |= flags
    return turns


FLAGS: list[dict[str, Any]] = [
    {"weight": 0}, {"weight": 0.0}, {"train": False}, {"training": False}, {"trainable": 0}, {"loss": False},
    {"loss_mask": 0}, {"weight": 0, "train": False},
]  # fmt: skip


@pytest.mark.parametrize("flag", FLAGS, ids=str)
def test_an_answer_flagged_as_not_to_be_learnt_is_context(templates: dict[str, Template], flag: dict[str, Any]) -> None:
    conversation = talk("Capital?", "Bogota.", "Sure?", "Sorry, Lima.", **flag)
    _, taught, seen = encoded(templates["qwen2_5"], {"messages": conversation})
    assert (taught, seen) == ("Sorry, Lima.<|im_end|>", set())
    spoken = [
        {"from": turn["role"], "value": turn["content"], **(flag if turn["content"] == "Bogota." else {})}
        for turn in conversation
    ]
    assert same(templates["qwen2_5"], {"messages": conversation}, {"conversations": spoken})


@pytest.mark.parametrize("shape", SHAPES)
def test_a_flag_takes_an_answer_from_the_loss_and_not_from_the_text(templates: dict[str, Template], shape: str) -> None:
    turns = ("Capital?", "Bogota.", "Sure?", "Sorry, Lima.")
    plain, _, _ = encoded(templates[shape], {"messages": talk(*turns)})
    flagged, taught, _ = encoded(templates[shape], {"messages": talk(*turns, weight=0)})
    assert flagged == plain
    assert "Sorry, Lima." in taught and "Bogota" not in taught


@pytest.mark.parametrize("value", [0.5, 2, "yes", "1", [1]])
def test_a_flag_that_is_neither_yes_nor_no_is_an_error_at_its_turn(value: Any) -> None:
    with pytest.raises(DataError, match=r"row:1: turn 2: the loss flag 'weight' is .*write 1 or true"):
        parse_rows([{"messages": talk("a", "b", weight=value)}])


def test_two_flags_that_contradict_each_other_are_an_error() -> None:
    with pytest.raises(DataError, match="turn 2: the loss flag 'train' contradicts another"):
        parse_rows([{"messages": talk("a", "b", weight=1, train=False)}])


def test_a_row_with_nothing_left_to_learn_is_d021(tmp_path: Path) -> None:
    rows = [{"messages": talk("a", "b", weight=0)}, {"messages": talk("c", "d")}]
    result = made.prepared(made.write(tmp_path / "rows.jsonl", rows), holdout=0.0, on_bad="drop")
    assert made.found(result, "D021").where.endswith("rows.jsonl:1")


def test_a_flag_that_asks_to_learn_the_users_words_is_told(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": "a", "train": True}, {"role": "assistant", "content": "b"}]}]
    assert (
        "turn 1 is the user's"
        in made.found(made.prepared(made.write(tmp_path / "a.jsonl", rows), holdout=0.0), "D051").message
    )


def test_earlier_answers_of_a_prompt_are_context(templates: dict[str, Template]) -> None:
    *prompt, last = talk("Hi", "Hello", "2+2?", "4")
    _, taught, _ = encoded(templates["chatml"], {"prompt": prompt, "completion": [last]})
    assert taught == "4<|im_end|>"


EQUAL: dict[str, tuple[Row, Row]] = {
    "history": (
        {"instruction": "And?", "output": "b", "history": [["Hi", "a"]]},
        {"messages": talk("Hi", "a", "And?", "b")},
    ),
    "history as JSON": (
        {"instruction": "And?", "output": "b", "history": '[["Hi", "a"]]'},
        {"messages": talk("Hi", "a", "And?", "b")},
    ),
    "context": (
        {"instruction": "How?", "context": "It is 31 m.", "response": "31 m."},
        {"instruction": "How?", "input": "It is 31 m.", "response": "31 m."},
    ),
    "input beside prompt": (
        {"prompt": "Translate:", "input": "morning", "response": "Morgen"},
        {"instruction": "Translate:", "input": "morning", "response": "Morgen"},
    ),
    "text parts": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "input_text", "text": "2+2?"}]},
                {"role": "model", "parts": [{"text": "4"}]},
            ]
        },
        {"prompt": "2+2?", "completion": "4"},
    ),
    "from and value in messages": (
        {"messages": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]},
        {"prompt": "2+2?", "completion": "4"},
    ),
    "other names of roles": (
        {"messages": [{"role": "human", "content": "2+2?"}, {"role": "AI", "content": "4"}]},
        {"prompt": "2+2?", "completion": "4"},
    ),
    "messages as JSON": (
        {"messages": '[{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]'},
        {"prompt": "2+2?", "completion": "4"},
    ),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("case", EQUAL)
def test_two_spellings_of_one_row_give_the_same_ids(templates: dict[str, Template], shape: str, case: str) -> None:
    assert same(templates[shape], *EQUAL[case])


@pytest.mark.parametrize("shape", sorted(set(SHAPES) - SYSTEM_FREE))
def test_a_system_text_is_the_same_under_all_its_names(templates: dict[str, Template], shape: str) -> None:
    plain = {"instruction": "Hi", "output": "Arr."}
    heads = [{"role": role, "content": "Be a pirate."} for role in ("system", "developer")]
    rows = [{**plain, name: "Be a pirate."} for name in ("system", "system_prompt")]
    assert same(templates[shape], *rows, *({"messages": [head, *talk("Hi", "Arr.")]} for head in heads))


def calls(call: Any, tools: Any = (TOOL,)) -> Row:
    """An answer that calls, a result, and an answer in words."""
    calling = {"role": "assistant", "content": "", "tool_calls": [call]}
    return {"messages": [ASK, calling, FOUND, SAY], "tools": list(tools)}


CALLING: dict[str, Row] = {
    "arguments as JSON": calls(TEXT_CALL),
    "flat tool": calls(CALL, [{"name": "weather", "parameters": {"type": "object"}}]),
    "tools as JSON": {**calls(CALL), "tools": '[{"name": "weather", "parameters": {"type": "object"}}]'},
    "parameters as JSON": calls(
        CALL, [{"type": "function", "function": {"name": "weather", "parameters": '{"type": "object"}'}}]
    ),
    "nulls of Arrow": calls(
        {**CALL, "function": {"name": "weather", "arguments": {"city": "Lima", "days": 2, "zone": None}}},
        [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": None}}}],
    ),
    "conversations": {"conversations": calls(CALL)["messages"], "tools": [TOOL]},
    "functions": {"messages": calls(CALL)["messages"], "functions": [TOOL["function"]]},
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("case", CALLING)
def test_a_call_gives_the_same_ids_however_it_is_written(templates: dict[str, Template], shape: str, case: str) -> None:
    assert same(templates[shape], calls(CALL), CALLING[case])


NAMELESS = {"type": "function", "function": CALL["function"]}
TEXT = '{"name": "weather", "arguments": {"city": "Lima", "days": 2}}'


@pytest.mark.parametrize("shape", SHAPES)
def test_calls_of_sharegpt_xlam_and_the_old_openai_field_are_those_of_messages(
    templates: dict[str, Template], shape: str
) -> None:
    turns = [ASK, {"role": "assistant", "content": "", "tool_calls": [NAMELESS]}]
    plain = {"messages": turns, "tools": [TOOL]}
    sharegpt = [{"from": "human", "value": ASK["content"]}, {"from": "function_call", "value": TEXT}]
    old = {
        "role": "assistant",
        "content": None,
        "function_call": {"name": "weather", "arguments": '{"city": "Lima", "days": 2}'},
    }
    assert same(
        templates[shape],
        plain,
        {"conversations": sharegpt, "tools": [TOOL]},
        {"query": ASK["content"], "answers": f"[{TEXT}]", "tools": [TOOL]},
        {"messages": [ASK, old], "functions": [TOOL["function"]]},
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_a_result_that_is_an_object_is_its_json(templates: dict[str, Template], shape: str) -> None:
    row, text = calls(CALL), {**FOUND, "content": '{"temp": 21}'}
    as_object = [{**turn, "content": {"temp": 21}} if turn is FOUND else turn for turn in row["messages"]]
    as_text = [text if turn is FOUND else turn for turn in row["messages"]]
    assert same(templates[shape], {**row, "messages": as_object}, {**row, "messages": as_text})


@pytest.mark.parametrize(
    ("call", "says"),
    [
        ({"function": {"name": "f", "arguments": '{"city": '}}, "turn 2: the call's arguments are no JSON"),
        ({"function": {"name": "f", "arguments": "[1]"}}, "turn 2: the call's arguments are a list, not an object"),
        ({"function": {"arguments": {}}}, "turn 2: a tool call has no name"),
    ],
)
def test_a_call_that_cannot_be_read_is_an_error_at_its_turn(call: Any, says: str) -> None:
    with pytest.raises(DataError, match=says):
        parse_rows([calls(call)])


def test_a_call_of_sharegpt_that_is_no_json_is_an_error_at_its_turn() -> None:
    row = {"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": "weather(Lima)"}]}
    with pytest.raises(DataError, match="turn 2: the call in 'function_call' is no JSON"):
        parse_rows([row])


READS_REASONING = {"qwen3", "qwen35", "harmony"}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["reasoning", "thinking", "reasoning_content"])
def test_reasoning_is_learnt_under_any_name_or_its_loss_is_told(
    templates: dict[str, Template], shape: str, name: str
) -> None:
    _, taught, seen = encoded(templates[shape], {"messages": talk("17*3?", "51", **{name: "17*3 is 51 now."})})
    assert ("17*3 is 51 now." in taught) is (shape in READS_REASONING)
    assert ("D027" in seen) is (shape not in READS_REASONING)


SHOWS_TOOL = {
    "llama3", "qwen2_5", "qwen3", "gemma4", "chatml", "thinkspecial", "granite", "smollm3", "qwen35", "deepseek",
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_a_tools_result_that_the_template_leaves_out_is_an_error_at_its_turn(
    templates: dict[str, Template], shape: str
) -> None:
    # the result stands in the answer too: looking for its words alone would not tell
    turns = [ASK, {"role": "assistant", "content": "CALL"}, {"role": "function", "name": "w", "content": "21 C"}]
    row = {"messages": [*turns, {"role": "assistant", "content": "It is 21 C."}]}
    one = templates[shape].encode(parse_rows([row])[0])
    seen = dict(token_checks(one))
    if shape in SHOWS_TOOL:
        assert "D039" not in seen and one.ids
    else:
        assert "D024" in seen or seen["D039"] == "the template leaves out the text of turn 3 (tool)"


def test_a_system_text_that_the_template_leaves_out_is_an_error(templates: dict[str, Template]) -> None:
    row = {"messages": [{"role": "system", "content": "Hi"}, *talk("Hi", "Hi there")]}
    one = templates["phi3old"].encode(parse_rows([row])[0])
    assert dict(token_checks(one))["D039"] == "the template leaves out the system text"
    late = [*talk("Hi", "Hello"), {"role": "system", "content": "In French."}, *talk("Thanks", "De rien")]
    one = templates["harmony"].encode(parse_rows([{"messages": late}])[0])
    assert dict(token_checks(one))["D039"] == "the template leaves out the text of turn 3 (system)"


def test_indentation_that_the_template_trims_is_told(templates: dict[str, Template]) -> None:
    indented = {"messages": talk("Complete:", "    return x\n    # end")}
    assert "D027" in encoded(templates["gemma"], indented)[2]
    assert "D027" not in encoded(templates["chatml"], indented)[2]
    assert "D027" not in encoded(templates["gemma"], {"messages": talk("x", "\n\nHello")})[2]


def test_marked_blocks_are_supervised_from_where_the_served_prompt_ends(templates: dict[str, Template]) -> None:
    quiet = [{"role": "system", "content": "/no_think"}, *talk("2+2?", "4", "3+3?", "6")]
    assert encoded(templates["smollm3"], {"messages": quiet})[1:] == ("4<|im_end|>6<|im_end|>", set())
    aloud = {"messages": talk("2+2?", "<think>\nEasy.\n</think>\n4")}
    assert encoded(templates["smollm3"], aloud)[1] == "<think>\nEasy.\n</think>\n4<|im_end|>"


def test_answers_that_a_template_rewrites_are_counted_and_can_stand_alone(
    tmp_path: Path, templates: dict[str, Template]
) -> None:
    thought = talk("Hi there", "<think>\nmm\n</think>\n\nHello!", "And?", "<think>\nhm\n</think>\n\nNo.")
    path = made.write(tmp_path / "rows.jsonl", [{"messages": thought}])
    result = made.prepared(path, templates["qwen3"], holdout=0.0)
    assert (
        "1 answers of" in made.found(result, "D025").message and "split_answers=true" in made.found(result, "D025").fix
    )
    alone = made.prepared(path, templates["qwen3"], holdout=0.0, split_answers=True)
    assert "D025" not in made.codes(alone) and len(alone.train) == 2
    assert (alone.summary.read, alone.summary.kept, alone.summary.split) == (1, 1, 1)
    taught = [[t for t, kept in zip(alone.train.ids(n).tolist(), alone.train.mask(n).tolist()) if kept] for n in (0, 1)]
    words = [templates["qwen3"].tokenizer.decode(ids, skip_special_tokens=False) for ids in taught]
    assert words == ["<think>\nmm\n</think>\n\nHello!<|im_end|>", "<think>\nhm\n</think>\n\nNo.<|im_end|>"]


@pytest.mark.parametrize("shape", SHAPES)
def test_every_token_of_a_document_is_supervised_and_eos_ends_it(templates: dict[str, Template], shape: str) -> None:
    template = templates[shape]
    one = template.encode(parse_rows([{"text": "  Once upon a time\n\n"}], {"text": "text"})[0])
    assert all(one.mask[1:]) and not one.mask[0] and one.problems == ()
    bos = template.tokenizer.bos_token if template.tokenizer.adds_bos else ""
    whole = f"{bos or ''}  Once upon a time\n\n{template.tokenizer.eos_token}"
    assert template.tokenizer.decode(one.ids, skip_special_tokens=False) == whole
