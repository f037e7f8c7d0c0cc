"""Shapes: four ways to spell a record, detected from the rows, and what is wrong with a row that fits none."""

from typing import Any

import pytest

from lorafit.data.schema.detection import detect
from lorafit.data.schema.records import Record, Turn
from lorafit.data.sources.raw_row import Reject
from lorafit.errors import DataError, UsageError


def record(row: dict[str, Any], mapped: dict[str, str] | None = None) -> Record:
    result = detect([row], mapped or {}, "x").record(row, "x:1")
    assert isinstance(result, Record), result
    return result


def turns(row: dict[str, Any], mapped: dict[str, str] | None = None) -> list[tuple[str, str]]:
    return [(turn.role, turn.content) for turn in record(row, mapped).turns]


def reject(like: dict[str, Any], row: dict[str, Any]) -> Reject:
    result = detect([like], {}, "x").record(row, "x:1")
    assert isinstance(result, Reject), result
    return result


ASKED = [("user", "ask"), ("assistant", "say")]


@pytest.mark.parametrize("answer", ["response", "output", "completion", "answer"])
@pytest.mark.parametrize("question", ["instruction", "prompt"])
def test_every_alias_of_the_answer_is_known(question: str, answer: str) -> None:
    assert turns({question: "ask", answer: "say"}) == ASKED


@pytest.mark.parametrize(
    ("row", "asked"),
    [
        ({"instruction": "do", "input": "this"}, "do\nthis"),
        ({"instruction": "do", "input": ""}, "do"),
        ({"instruction": "do", "input": None}, "do"),
        ({"instruction": "do\n", "input": "\n  this "}, "do\n  this"),
        ({"instruction": "", "input": "this"}, "this"),
    ],
)
def test_an_input_stands_on_a_line_of_its_own_and_an_empty_one_leaves_none(row: dict[str, Any], asked: str) -> None:
    assert turns({**row, "response": "x"})[0] == ("user", asked)


def test_a_system_field_goes_before_the_turns() -> None:
    assert record({"instruction": "a", "response": "b", "system": "be kind"}).system == "be kind"
    assert record({"prompt": "a", "completion": "b", "system": ""}).system is None


def test_openai_messages_keep_all_turns_tools_and_tool_calls() -> None:
    calls = [{"type": "function", "function": {"name": "f", "arguments": "{}"}}]
    row = {
        "tools": [{"type": "function"}],
        "messages": [
            {"role": "system", "content": "s"},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "assistant", "content": None, "tool_calls": calls},
            {"role": "tool", "content": "42", "tool_call_id": "1"},
            {"role": "assistant", "content": "done"},
        ],
    }
    result = record(row)
    assert (result.system, result.tools) == ("s", ({"type": "function"},))
    assert result.turns == (
        Turn("user", "ab"),
        Turn("assistant", "", {"tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}]}),
        Turn("tool", "42", {"tool_call_id": "1"}),
        Turn("assistant", "done"),
    )


def test_sharegpt_conversations_become_turns() -> None:
    row = {
        "conversations": [
            {"from": "system", "value": "s"},
            {"from": "human", "value": "ask"},
            {"from": "gpt", "value": "say"},
        ]
    }
    assert turns(row) == ASKED
    assert record(row).system == "s"


def test_a_map_names_fields_of_any_kind() -> None:
    assert (
        turns({"question": "ask", "answer_text": "say"}, {"instruction": "question", "response": "answer_text"})
        == ASKED
    )
    assert turns(
        {"chat": [{"from": "human", "value": "ask"}, {"from": "gpt", "value": "say"}]}, {"conversations": "chat"}
    )


@pytest.mark.parametrize(
    ("mapped", "says"),
    [
        (
            {"response": "nosuch"},
            r"--map: no row has the field 'nosuch', which is mapped to 'response'.*the rows have a, q",
        ),
        ({"completion": "aa"}, r"no row has the field 'aa'.*did you mean 'a'"),
        ({"prompt": "q", "completion": "a", "messages": "turns"}, "no row has the field 'turns'"),
    ],
)
def test_a_map_from_a_field_that_no_row_has_is_refused(mapped: dict[str, str], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        detect([{"q": "ask", "a": "say"}], mapped, "x")


def test_a_field_that_not_every_row_needs_may_come_later() -> None:
    assert record({"prompt": "ask", "completion": "say"}, {"system": "persona", "input": "context"}).system is None


def test_a_map_to_a_field_that_lorafit_does_not_know_names_the_nearest() -> None:
    with pytest.raises(UsageError, match="did you mean 'response'"):
        detect([{"a": 1}], {"respons": "a"}, "x")


def test_rows_of_no_known_shape_are_one_sentence_with_their_fields() -> None:
    with pytest.raises(DataError, match=r"data\.jsonl: .*\(answer_text, question\).*--map"):
        detect([{"question": "a", "answer_text": "b"}], {}, "data.jsonl")


def test_the_map_that_is_proposed_takes_the_longest_text_beside_a_known_answer() -> None:
    row = {
        "Ticket ID": "17",
        "Subject": "Refund",
        "Customer message": "My order is late.",
        "Agent Reply": "It is sent.",
    }
    with pytest.raises(DataError, match="--map 'instruction=Customer message' --map 'response=Agent Reply'"):
        detect([row], {}, "tickets.csv")


def test_the_map_that_is_proposed_names_no_running_number() -> None:
    row = {"No": "1", "Ticket": "My order is late.", "Queue": "shipping"}
    with pytest.raises(DataError, match="--map instruction=Ticket --map response=Queue"):
        detect([row], {}, "tickets.csv")
    with pytest.raises(DataError, match="--map instruction=Sum --map response=Result"):
        detect([{"Sum": "1 + 1", "Result": "2"}], {}, "sums.csv")


def test_a_prompt_and_a_completion_may_be_turns() -> None:
    ask, say = {"role": "user", "content": "ask"}, {"role": "assistant", "content": "say"}
    assert turns({"prompt": [ask], "completion": [say]}) == ASKED
    system = {"role": "system", "content": "be brief"}
    assert record({"prompt": [system, ask], "completion": [say]}).system == "be brief"
    assert turns({"prompt": [ask], "completion": "say"}) == turns({"prompt": "ask", "completion": [say]}) == ASKED
    # of a conversation every answer is learnt, and here only the last one is to be
    spoken = record({"prompt": [ask, say, ask], "completion": [say]})
    assert [turn.taught for turn in spoken.turns] == [False, False, False, True]
    assert reject({"prompt": "a", "completion": "b"}, {"prompt": [ask], "completion": [3]}).code == "D012"


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"text": "### Q: a ### A: b", "id": 3}, "do not say what of it is asked .* write prompt and completion"),
    ],
)
def test_rows_that_people_often_have_and_that_say_too_little_are_told_what_to_write(row, what) -> None:
    with pytest.raises(DataError, match=what):
        detect([row], {}, "x")


def test_the_shape_is_that_of_most_rows() -> None:
    odd, usual = {"messages": []}, {"instruction": "a", "output": "b"}
    assert detect([odd, usual, usual], {}, "x").title == "instruction/input/output"


INSTRUCTION = {"instruction": "a", "response": "b"}
MESSAGES = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
CONVERSATIONS = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}


@pytest.mark.parametrize(
    ("like", "row", "code", "reason"),
    [
        (INSTRUCTION, {"instruction": "a"}, "D010", "no field 'response'"),
        (INSTRUCTION, {"instruction": "a", "respnse": "b"}, "D010", "no field 'response' (there is 'respnse')"),
        (INSTRUCTION, {"response": "b"}, "D010", "no field 'instruction'"),
        (INSTRUCTION, {"instruction": "a", "response": None}, "D011", "the field 'response' is null"),
        (INSTRUCTION, {"instruction": "a", "response": 42}, "D012", "the field 'response' is a number, not text"),
        (INSTRUCTION, {"instruction": ["a"], "response": "b"}, "D012", "the field 'instruction' is a list, not text"),
        (INSTRUCTION, {**INSTRUCTION, "input": 3}, "D012", "the field 'input' is a number, not text"),
        (INSTRUCTION, {**INSTRUCTION, "system": {"a": 1}}, "D012", "the field 'system' is an object, not text"),
        (MESSAGES, {"text": "a"}, "D010", "no field 'messages'"),
        (MESSAGES, {"messages": None}, "D011", "the field 'messages' is not a list of turns"),
        (MESSAGES, {"messages": "a"}, "D012", "the field 'messages' is not a list of turns"),
        (MESSAGES, {"messages": []}, "D016", "the conversation has no assistant turn"),
        (MESSAGES, {"messages": [{"role": "user", "content": "a"}]}, "D016", "the conversation has no assistant turn"),
        (MESSAGES, {"messages": ["a"]}, "D012", "turn 1: is a text, not an object with role and content"),
        (MESSAGES, {"messages": [{"role": "user"}]}, "D010", "turn 1: no field 'content'"),
        (MESSAGES, {"messages": [{"role": "user", "content": None}]}, "D011", "turn 1: the field 'content' is null"),
        (
            MESSAGES,
            {"messages": [{"role": "user", "content": 1}]},
            "D012",
            "turn 1: the field 'content' is a number, not text",
        ),
        (MESSAGES, {**MESSAGES, "tools": ["f"]}, "D012", "the field 'tools' is not a list of objects"),
        (CONVERSATIONS, {"conversations": [{"from": "gpt"}]}, "D010", "turn 1: no field 'value'"),
        (
            CONVERSATIONS,
            {"conversations": [{"from": "gpt", "value": None}]},
            "D011",
            "turn 1: the field 'value' is null",
        ),
    ],
)
def test_a_row_that_does_not_fit_says_which_field_and_why(
    like: dict[str, Any], row: dict[str, Any], code: str, reason: str
) -> None:
    result = reject(like, row)
    assert (result.code, result.reason) == (code, reason)


@pytest.mark.parametrize(
    ("like", "turn"),
    [(MESSAGES, {"role": "narrator", "content": "a"}), (CONVERSATIONS, {"from": "narrator", "value": "a"})],
)
def test_an_unknown_role_is_named_with_the_known_ones(like: dict[str, Any], turn: dict[str, Any]) -> None:
    result = reject(like, {next(iter(like)): [turn]})
    assert result.code == "D012"
    assert "'narrator' is none of" in result.reason


def test_an_image_in_a_message_is_named() -> None:
    row = {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}
    assert "not text ('image_url')" in reject(MESSAGES, row).reason
