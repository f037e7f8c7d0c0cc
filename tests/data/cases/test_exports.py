"""The command that an error prints for another tool's export, executed as printed, gives rows that are read."""

import json
import shlex
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import made_data as made
from lorafit.errors import DataError

Row = dict[str, Any]
ASK, SAY = {"role": "user", "content": "ask"}, {"role": "assistant", "content": "say"}
TOLD = [("user", "ask"), ("assistant", "say")]


def node(role: str, text: str, parent: str | None) -> Row:
    content = {"content_type": "text", "parts": [text]}
    return {"message": {"author": {"role": role}, "content": content}, "parent": parent, "children": []}


def reply(role: str, text: str, *replies: Row) -> Row:
    return {"text": text, "role": role, "replies": list(replies)}


EXPORTS: dict[str, tuple[Row, str]] = {
    "Label Studio": (
        {
            "id": 1,
            "data": {"text": "ask"},
            "annotations": [{"result": [{"from_name": "reply", "type": "textarea", "value": {"text": ["say"]}}]}],
        },
        "export of Label Studio",
    ),
    "Label Studio choices": (
        {"data": {"text": "ask"}, "annotations": [{"result": [{"from_name": "c", "value": {"choices": ["say"]}}]}]},
        "export of Label Studio",
    ),
    "OpenAssistant trees": (
        {"message_tree_id": "1", "prompt": reply("prompter", "ask", reply("assistant", "say"))},
        "trees of conversations",
    ),
    "ChatGPT": (
        {"title": "t", "current_node": "c", "mapping": {
            "a": {"message": None, "parent": None}, "b": node("user", "ask", "a"), "c": node("assistant", "say", "b")}},
        "export of ChatGPT",
    ),
    "Argilla": ({"instruction": "ask", "response.responses": ["say"]}, "export of Argilla"),
    "OpenAI log": (
        {"request": {"model": "m", "messages": [ASK]}, "response": {"choices": [{"message": SAY}]}}, "inside of other"
    ),
    "OpenAI batch": ({"custom_id": "1", "method": "POST", "body": {"messages": [ASK, SAY]}}, "inside of other"),
    "LangSmith": ({"inputs": {"messages": [ASK]}, "outputs": {"messages": [SAY]}}, "inside of other"),
    "LangSmith, one answer": ({"inputs": {"messages": [ASK]}, "outputs": SAY}, "inside of other"),
    "LLaMA-Factory pairs": (
        {"conversations": [{"from": "human", "value": "ask"}], "chosen": {"from": "gpt", "value": "say"},
         "rejected": {"from": "gpt", "value": "no"}},
        "preference data",
    ),
    "pairs of texts": ({"messages": [ASK], "chosen": "say", "rejected": "no"}, "preference data"),
    "HH": (
        {"chosen": "\n\nHuman: ask\n\nAssistant: say", "rejected": "\n\nHuman: ask\n\nAssistant: no"}, "preference data"
    ),
}  # fmt: skip


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
@pytest.mark.parametrize("case", EXPORTS)
def test_the_command_for_an_export_works_as_printed(tmp_path: Path, case: str, suffix: str) -> None:
    row, what = EXPORTS[case]
    content = made.jsonl([row, row]) if suffix == ".jsonl" else json.dumps([row, row], indent=1).encode()
    with pytest.raises(DataError, match=what) as caught:
        made.spoken(made.write(tmp_path / f"export{suffix}", content))
    pairs = made.run_fix(str(caught.value.fix), tmp_path)
    assert made.spoken(tmp_path / "rows.jsonl", field_map=pairs) == [TOLD, TOLD]


def test_each_path_of_a_tree_becomes_a_row(tmp_path: Path) -> None:
    tree = reply("prompter", "a", reply("assistant", "b", reply("prompter", "c")), reply("assistant", "d"))
    with pytest.raises(DataError, match="trees") as caught:
        made.spoken(made.write(tmp_path / "a.jsonl", [{"prompt": tree}]))
    made.run_fix(str(caught.value.fix), tmp_path)
    assert [[text for _, text in row] for row in made.spoken(tmp_path / "rows.jsonl")] == [["a", "b"], ["a", "d"]]


def test_single_messages_of_a_parquet_file_become_conversations(tmp_path: Path) -> None:
    rows = [
        {"message_id": "1", "parent_id": None, "text": "ask", "role": "prompter", "lang": "en"},
        {"message_id": "2", "parent_id": "1", "text": "say", "role": "assistant", "lang": "en"},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "oasst.parquet")
    with pytest.raises(DataError, match="single messages of conversations") as caught:
        made.spoken(tmp_path / "oasst.parquet")
    made.run_fix(str(caught.value.fix), tmp_path)
    assert made.spoken(tmp_path / "rows.jsonl") == [TOLD]


def test_the_command_for_argillas_answers_works_as_printed(tmp_path: Path) -> None:
    for field in ("instruction", "prompt"):
        rows = [{field: "ask", "response": [{"value": "say", "status": "submitted"}]}] * 2
        result = made.prepared(made.write(tmp_path / "argilla.jsonl", rows), holdout=0.0, on_bad="drop")
        made.run_fix(made.found(result, "D012").fix, tmp_path)
        assert made.spoken(tmp_path / "rows.jsonl") == [TOLD, TOLD]


def test_the_tools_of_a_logged_request_are_kept(tmp_path: Path) -> None:
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
    body = {"messages": [ASK, SAY], "tools": [tool]}
    with pytest.raises(DataError, match="inside of other") as caught:
        made.spoken(made.write(tmp_path / "a.jsonl", [{"body": body}, {"body": body}]))
    made.run_fix(str(caught.value.fix), tmp_path)
    assert json.loads((tmp_path / "rows.jsonl").read_text().splitlines()[0]) == body


def test_turns_beside_an_answer_are_mapped_as_its_prompt(tmp_path: Path) -> None:
    for answer in ("output", "ideal"):
        path = made.write(tmp_path / f"{answer}.jsonl", [{"input": [ASK], answer: "say"}])
        with pytest.raises(DataError, match="--map prompt=input") as caught:
            made.spoken(path)
        words = shlex.split(str(caught.value.fix))
        pairs = dict(word.split("=", 1) for flag, word in pairwise(words) if flag == "--map")
        assert made.spoken(path, field_map=pairs) == [TOLD]


OTHERWISE = {
    "python": (".jsonl", b"{'prompt': 'ask', 'completion': \"it's\"}\n\n{'prompt': 'b', 'completion': 'c', 'x': None}"),
    "a list in python": (".json", b"[{'prompt': 'ask', 'completion': \"it's\"},\n {'prompt': 'b', 'completion': 'c'}]"),
    "yaml": (".jsonl", b"# mine\n- prompt: ask\n  completion: it's\n- prompt: b\n  completion: c\n"),
    "yaml documents": (".json", b"---\nprompt: ask\ncompletion: it's\n---\nprompt: b\ncompletion: c\n"),
    "markdown": (".jsonl", b"| prompt | completion |\n|---|---|\n| ask | it's |\n| b | c |\n"),
    "markdown below a title": (".csv", b"# Mine\n| prompt | completion |\n|:--|--:|\n| ask | it's |\n| b | c |\n"),
    "markdown below a title, as rows": (".jsonl", b"Mine\n|prompt|completion|\n|---|---|\n|ask|it's|\n|b|c|\n"),
}  # fmt: skip


@pytest.mark.parametrize("case", OTHERWISE)
def test_the_command_for_rows_that_are_written_otherwise_works(tmp_path: Path, case: str) -> None:
    suffix, content = OTHERWISE[case]
    with pytest.raises(DataError, match=r"holds|is YAML") as caught:
        made.spoken(made.write(tmp_path / f"my rows{suffix}", content))
    made.run_fix(str(caught.value.fix), tmp_path)
    (out,) = tmp_path.glob("rows.*")
    assert [[text for _, text in row] for row in made.spoken(out)] == [["ask", "it's"], ["b", "c"]]
