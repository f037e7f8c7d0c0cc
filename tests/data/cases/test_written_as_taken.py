"""What a template cannot be shown as the row has it: written as the template takes it, with nothing lost, and said."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

import made_data
import made_tokenizers as made
from lorafit.data import Template
from lorafit.data.checks.rows import token_checks
from lorafit.data.gather import parse_rows
from lorafit.data.template.call_ids import FITTING, with_short_ids
from lorafit.data.template.thoughts import TAGS, split_thought
from lorafit.data.tokenizer.tokenizer import TextTokenizer
from lorafit.errors import DataError
from template_shapes import GPT_OSS, MISTRAL_IDS, SHAPES

USER, TOOL_SAYS = {"role": "user", "content": "Weather?"}, {"role": "tool", "content": "19 C"}
DONE = {"role": "assistant", "content": "It is 19 C."}


def call(name: str = "weather", **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": {"city": "Lima"}}, **more}


def asks(*calls: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": "", "tool_calls": list(calls), **more}


def made_of(source: str, shape: str, folder: Path) -> Template:
    """The template `source` over the tokenizer of a shape."""
    made.special_folder(folder, made.byte_level(), template=source, **SHAPES[shape][1])
    return Template.for_tokenizer(TextTokenizer.from_folder(folder))


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory: pytest.TempPathFactory) -> Template:
    return made_of(GPT_OSS, "harmony", tmp_path_factory.mktemp("oss"))


@pytest.fixture(scope="module")
def mistral(tmp_path_factory: pytest.TempPathFactory) -> Template:
    return made_of(MISTRAL_IDS, "mistral", tmp_path_factory.mktemp("mistral"))


def shown(template: Template, *messages: dict[str, Any]) -> tuple[str, set[str]]:
    """The row with what is taught in ⟦ ⟧, and the codes of what was seen."""
    one = template.encode(parse_rows([{"messages": list(messages)}])[0])
    text, piece, is_taught = "", [], False
    for token, taught in [*zip(one.ids, one.mask), (None, False)]:
        if taught != is_taught or token is None:
            text += template.tokenizer.decode(piece, skip_special_tokens=False) + ("⟦" if taught else "⟧" * is_taught)
            piece, is_taught = [], taught
        piece += [token] if token is not None else []
    return text, {code for code, _ in token_checks(one)}


@pytest.mark.parametrize("beside", [{"thinking": "I need it."}, {"content": "I need it."}], ids=["reasoning", "text"])
def test_what_stands_beside_a_call_is_taught_as_served(gpt_oss: Template, beside: dict[str, Any]) -> None:
    text, seen = shown(gpt_oss, USER, asks(call(), **beside), TOOL_SAYS, DONE | {"thinking": "Clear."})
    said = "<|channel|>analysis<|message|>I need it.<|end|><|start|>assistant to=functions.weather"
    called = "⟦" + said + '<|channel|>commentary json<|message|>{"city": "Lima"}<|call|>⟧'
    final = "<|start|>assistant<|channel|>final<|message|>It is 19 C.<|return|>⟧"
    assert called in text and text.endswith("⟦<|channel|>analysis<|message|>Clear.<|end|>" + final) and seen == set()
    prompt = [USER, asks(call(), **beside), TOOL_SAYS]
    served, one = gpt_oss.prompt_ids(prompt), gpt_oss.encode(parse_rows([{"messages": [*prompt, DONE]}])[0])
    assert one.ids[: len(served)] == served


def test_every_step_of_a_chain_of_calls_is_taught(gpt_oss: Template) -> None:
    steps = [turn for n in range(3) for turn in (asks(call(f"tool{n}"), thinking=f"Thought {n}."), TOOL_SAYS)]
    text, seen = shown(gpt_oss, USER, *steps, DONE)
    assert seen == set() and text.count("⟦") == 4 and all(f"Thought {n}." in text for n in range(3))


def test_reasoning_and_text_beside_a_call_are_joined(gpt_oss: Template) -> None:
    text, seen = shown(gpt_oss, USER, asks(call(), thinking="A tool.", content="One moment."), TOOL_SAYS, DONE)
    assert "<|channel|>analysis<|message|>A tool.\n\nOne moment.<|end|>" in text and seen == {"D055"}


def test_an_earlier_round_whose_thoughts_are_gone_is_told(gpt_oss: Template) -> None:
    rows = [USER, asks(call(), thinking="A tool."), TOOL_SAYS, DONE, USER, DONE]
    text, seen = shown(gpt_oss, *rows)
    assert seen == {"D025"} and text.count("⟦") == 1 and "A tool." not in text


@pytest.mark.parametrize(("opening", "closing"), [*TAGS, ("<Think>", "</Think>")], ids=lambda tag: tag)
@pytest.mark.parametrize("lead", ["", "\n"], ids=["bare", "line"])
def test_reasoning_between_tags_is_the_templates_own(gpt_oss: Template, opening: str, closing: str, lead: str) -> None:
    text, seen = shown(gpt_oss, USER, {**DONE, "content": f"{lead}{opening}\nHm, 19.\n{closing}\n\nIt is 19 C."})
    apart, _ = shown(gpt_oss, USER, {**DONE, "thinking": "Hm, 19."})
    assert text == apart and seen == {"D055"}


@pytest.mark.parametrize(
    "content",
    [
        "Well <think>hm</think> 19",
        "<think>never closed",
        "<think>a</think>b<think>c</think>d",
        "<think>only</think>",
        "<reasoning>r</reasoning> 19",
    ],
)
def test_tags_that_cannot_be_split_are_told(gpt_oss: Template, content: str) -> None:
    text, seen = shown(gpt_oss, USER, {**DONE, "content": content})
    assert content in text and seen == {"D056"}


@pytest.mark.parametrize("shape", ["chatml", "thinkspecial", "llama3", "qwen3"])
def test_tags_stay_where_the_template_has_no_other_way(shape: str, templates: dict[str, Template]) -> None:
    text, seen = shown(templates[shape], USER, {**DONE, "content": "<think>\nHm.\n</think>\n\n19"})
    assert "⟦<think>\nHm.\n</think>\n\n19" in text and seen <= {"D028"}


def test_a_closing_tag_alone_ends_reasoning() -> None:
    assert split_thought("Hm.\n</think>\n\n19", TAGS) == ("Hm.", "19")
    assert split_thought("<think>\n\n</think>\n\n19", TAGS) == ("", "19")
    assert split_thought("no tags", TAGS) is None


TOOLU = "toolu_01A09q90qw90lq917835lq9"


@pytest.mark.parametrize(
    "ids", [("call_1", "call_1"), (TOOLU, TOOLU), (None, None), ("x-1", "x-1"), (None, "call_9")], ids=str
)
def test_ids_of_nine_characters_are_made(mistral: Template, ids: tuple[str | None, str | None]) -> None:
    named, answered = ({} if one is None else {key: one} for key, one in zip(("id", "tool_call_id"), ids))
    text, seen = shown(mistral, USER, asks(call(**named)), {**TOOL_SAYS, **answered}, DONE)
    first, second = re.findall(r", id (\w{9})\W", text)
    assert (first == second or ids[0] != ids[1]) and seen == {"D055"} and "⟦ It is 19 C.</s>⟧" in text


def test_a_fitting_id_is_left_alone_and_nothing_is_said(mistral: Template) -> None:
    text, seen = shown(mistral, USER, asks(call(id="Abc123xyz")), {**TOOL_SAYS, "tool_call_id": "Abc123xyz"}, DONE)
    assert text.count("Abc123xyz") == 2 and "D055" not in seen


def test_a_call_and_its_result_keep_one_id_each() -> None:
    long = "chatcmpl-tool-0123456789abcdef"
    calls = [call(id=long), call(id="b"), call()]
    results = [{**TOOL_SAYS, "tool_call_id": one} for one in ("b", long)] + [TOOL_SAYS]
    (asked, *answered), made_one = with_short_ids([asks(*calls), *results])
    first, second, third = (one["id"] for one in asked["tool_calls"])
    assert [one["tool_call_id"] for one in answered] == [second, first, third] and made_one
    assert first == long[-9:] and len({first, second, third}) == 3
    assert all(FITTING.fullmatch(one) for one in (first, second, third))
    assert with_short_ids([asked, *answered]) == ([asked, *answered], False)


def test_several_calls_stand_one_a_turn_each_before_its_result(gpt_oss: Template) -> None:
    first, second = call("one", id="a"), call("two", id="b")
    answered = [{**TOOL_SAYS, "tool_call_id": "b", "content": "second"}, {**TOOL_SAYS, "tool_call_id": "a"}]
    text, seen = shown(gpt_oss, USER, asks(first, second, thinking="Both."), *answered, DONE)
    apart = [asks(first, thinking="Both."), answered[1], asks(second), answered[0]]
    assert (text, seen) == (shown(gpt_oss, USER, *apart, DONE)[0], {"D055"}) and text.count("⟦") == 3
    quiet, _ = shown(gpt_oss, USER, asks(first, second, thinking="Both.", weight=0), *answered, DONE)
    assert quiet.count("⟦") == 1
    assert shown(gpt_oss, USER, asks(first, second))[1] == {"D027"}, "calls without results are told, not taken apart"


@pytest.mark.parametrize(
    "field",
    [
        {"thought": "Hm."},
        {"reasoning_details": [{"type": "reasoning.text", "text": "Hm."}], "reasoning": "Hm."},
        {"thinking_blocks": [{"type": "thinking", "thinking": "Hm.", "signature": "x"}]},
    ],
    ids=lambda field: next(iter(field)),
)
def test_reasoning_of_other_servers_is_read(gpt_oss: Template, field: dict[str, Any]) -> None:
    assert shown(gpt_oss, USER, DONE | field) == shown(gpt_oss, USER, DONE | {"thinking": "Hm."})


def test_reasoning_that_is_no_text_is_an_error() -> None:
    hidden = DONE | {"reasoning_details": [{"type": "reasoning.encrypted", "data": "x"}]}
    with pytest.raises(DataError, match="'reasoning_details' is a list, not text"):
        parse_rows([{"messages": [USER, hidden]}])


ROUNDS = [
    {"role": "system", "content": "Be brief."},
    USER,
    asks(call(id="a"), call("clock", id="b"), thinking="Two tools."),
    {**TOOL_SAYS, "tool_call_id": "a"},
    {**TOOL_SAYS, "content": "12:00", "tool_call_id": "b"},
    {**DONE, "thinking": "First."},
    {"role": "user", "content": "And now?"},
    {"role": "assistant", "content": "Now it is 20 C.", "thinking": "Second."},
    {"role": "user", "content": "Thanks"},
    {"role": "assistant", "content": "Gladly."},
]


@pytest.mark.parametrize("rows", [[ROUNDS], [ROUNDS[:2] + ROUNDS[5:]]], ids=["calls", "plain"])
def test_the_fix_of_d025_teaches_every_answer_of_every_round_once(
    gpt_oss: Template, tmp_path: Path, rows: list[list[dict[str, Any]]]
) -> None:
    path = made_data.write(tmp_path / "rows.jsonl", [{"messages": row} for row in rows])
    before = made_data.prepared(path, gpt_oss, holdout=0.0)
    flag, setting = shlex.split(made_data.found(before, "D025").fix)[:2]
    name, _, value = setting.partition("=")
    assert flag == "--set" and value == "true"
    alone = made_data.prepared(path, gpt_oss, holdout=0.0, **{name: value})
    kept = [zip(alone.train.ids(n).tolist(), alone.train.mask(n).tolist()) for n in range(len(alone.train))]
    taught = [gpt_oss.tokenizer.decode([token for token, is_taught in row if is_taught]) for row in kept]
    final = [
        "analysisFirst.assistantfinalIt is 19 C.", "analysisSecond.assistantfinalNow it is 20 C.", "finalGladly.",
    ]  # fmt: skip
    calls = [
        ' to=functions.weathercommentary json{"city": "Lima"}',
        ' to=functions.clockcommentary json{"city": "Lima"}',
    ]
    if len(rows[0]) == len(ROUNDS):
        final = [f"analysisTwo tools.assistant{calls[0]}", calls[1], *final]
    assert [re.sub(r"<\|\w+\|>", "", text) for text in taught] == final
    assert {"D025", "D027"}.isdisjoint(made_data.codes(alone))


def test_calls_that_end_a_row_with_their_results_stay_whole(gpt_oss: Template, tmp_path: Path) -> None:
    path = made_data.write(tmp_path / "rows.jsonl", [{"messages": ROUNDS[:5]}])
    result = made_data.prepared(path, gpt_oss, holdout=0.0)
    ids, mask = result.train.ids(0).tolist(), result.train.mask(0).tolist()
    taught = gpt_oss.tokenizer.decode([token for token, is_taught in zip(ids, mask) if is_taught])
    assert "functions.weather" in taught and "functions.clock" in taught and "D027" not in made_data.codes(result)


def test_the_turn_of_a_lost_text_is_counted_as_the_row_has_it(tmp_path: Path) -> None:
    source = GPT_OSS.replace(
        "{% else %}{{ '<|start|>' + m.role", "{% elif m.content != 'Lost' %}{{ '<|start|>' + m.role"
    )
    template = made_of(source, "harmony", tmp_path / "base")
    rows = [*ROUNDS[1:6], {"role": "user", "content": "Lost"}, DONE]
    one = template.encode(parse_rows([{"messages": rows}])[0])
    assert dict(token_checks(one))["D039"] == "the template leaves out the text of turn 6 (user)"
