"""Spellings, flags and containers that the first collection of other people's files did not have."""

import gzip
import json
import re
import shlex
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import made_data as made
from lorafit.data import Prepared, Template, parse_rows
from lorafit.errors import DataError, LorafitError

TOLD = [("user", "ask"), ("assistant", "say")]
USER, ASSISTANT = {"role": "user", "content": "ask"}, {"role": "assistant", "content": "say"}


def told(result: Prepared) -> list[list[tuple[str, str]]]:
    """Role and content of every turn of every row."""
    rows = result.train
    return [[(turn.role, turn.content) for turn in rows.record(place).turns] for place in range(len(rows))]


SPELLINGS: dict[str, dict[str, Any]] = {
    "Capybara": {"conversations": [{"input": "ask", "output": "say"}]},
    "Firefly": {"conversations": [{"human": "ask", "assistant": "say"}]},
    "questions and answers": {"messages": [{"question": "ask", "answer": "say", "id": None}]},
    "LangChain": {"messages": [{"type": "human", "content": "ask"}, {"type": "ai", "content": "say"}]},
    "turns alone": {"prompt": USER, "completion": ASSISTANT},
    "a turn and a list": {"prompt": [USER], "completion": ASSISTANT},
    "a turn and a text": {"prompt": USER, "completion": "say"},
    "no context": {"instruction": "ask", "context": [], "output": "say"},
    "options that were asked": {"instruction": "ask", "choices": ["a", "k"], "output": "say"},
    "turns as JSON texts": {"prompt": json.dumps([USER]), "completion": json.dumps([ASSISTANT])},
    "a flag as CSV has it": {"prompt": "ask", "completion": "say", "weight": "1"},
}


@pytest.mark.parametrize("case", SPELLINGS)
def test_a_spelling_is_read(tmp_path: Path, case: str) -> None:
    result = made.prepared(made.write(tmp_path / "rows.jsonl", [SPELLINGS[case]]), holdout=0.0)
    assert told(result) == [TOLD]


def test_history_may_hold_its_rounds_as_objects() -> None:
    row = {"instruction": "ask", "output": "say", "history": [{"question": "a", "answer": "b"}]}
    assert [turn.content for turn in parse_rows([row])[0].turns] == ["a", "b", "ask", "say"]


def test_texts_of_a_context_stand_one_below_the_other() -> None:
    record = parse_rows([{"instruction": "ask", "context": ["one", "two"], "output": "say"}])[0]
    assert record.turns[0].content == "ask\none\ntwo"


def test_items_of_openais_responses_are_calls_and_results(tmp_path: Path) -> None:
    items = [
        USER,
        {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": '{"city": "Lima"}'},
        {"type": "function_call_output", "call_id": "c1", "output": "21 C"},
        ASSISTANT,
    ]
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Lima"}}}
    plain = [
        USER,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "21 C"},
        ASSISTANT,
    ]
    assert parse_rows([{"messages": items}])[0].turns == parse_rows([{"messages": plain}])[0].turns


LOST: dict[str, tuple[dict[str, Any], str, str]] = {
    "a flag of a row in CSV": ({"weight": "0"}, "D038", "flag 'weight'"),
    "a label of a row in CSV": ({"label": "False"}, "D038", "flag 'label'"),
    "a weight of a row": ({"weight": 0.5}, "D038", "neither 0 nor 1"),
    "options that nobody is asked": ({"choices": ["north", "south"]}, "D038", "'choices'"),
    "options by letter": ({"options": {"A": "north"}}, "D038", "'options'"),
    "a passage": ({"passage": "Long ago."}, "D038", "'passage'"),
    "contexts": ({"contexts": ["Long ago."]}, "D038", "'contexts'"),
    "a chain of thought": ({"cot": "First."}, "D038", "'cot'"),
    "a rationale": ({"rationale": "First."}, "D038", "'rationale'"),
}


@pytest.mark.parametrize("case", LOST)
def test_what_a_row_would_lose_is_an_error(tmp_path: Path, case: str) -> None:
    more, code, what = LOST[case]
    path = made.write(tmp_path / "rows.jsonl", [{"prompt": "ask", "completion": "say", **more}])
    assert what in made.found(made.prepared(path, holdout=0.0), code).message


def test_the_place_for_options_that_the_fix_names_works(tmp_path: Path) -> None:
    path = made.write(tmp_path / "rows.jsonl", [{"prompt": "ask", "completion": "say", "choices": ["x", "y"]}])
    fix = made.found(made.prepared(path, holdout=0.0), "D038").fix
    assert "--map input=NAME" in fix
    assert told(made.prepared(path, holdout=0.0, field_map={"input": "choices"}))[0][0] == ("user", "ask\nx\ny")


@pytest.mark.parametrize("held", [{"images": ["x.png"]}, {"audio": {"id": "a"}}, {"image_url": "x"}], ids=str)
def test_more_than_text_in_a_turn_is_an_error_at_its_turn(held: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"row:1: turn 1: the turn holds more than text .*--on-bad drop"):
        parse_rows([{"messages": [{**USER, **held}, ASSISTANT]}])


@pytest.mark.parametrize("turn", [{"content": "ask"}, {"role": None, "content": "ask"}, {"mood": "A", "text": "x"}])
def test_a_turn_without_a_role_says_so(turn: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="turn 1: the turn names no role"):
        parse_rows([{"messages": [turn, ASSISTANT]}])


NAMED = tuple({**turn, "name": "Ann", "mood": "calm"} for turn in (USER, ASSISTANT))
READS_NAMES = (
    "{% for m in messages %}<|im_start|>{{ m.role }} {{ m.name }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant Ann\n{% endif %}"
)


def test_a_name_that_the_template_does_not_show_is_listed(tmp_path: Path, templates: dict[str, Template]) -> None:
    path = made.write(tmp_path / "rows.jsonl", [{"messages": list(NAMED)}])
    base = templates["chatml"]
    found = made.found(made.prepared(path, base, holdout=0.0), "D037")
    assert found.message == "columns that are not used: mood (of a turn), name (of a turn)"
    reads = Template(base.tokenizer, READS_NAMES)
    assert made.found(made.prepared(path, reads, holdout=0.0), "D037").message.endswith(": mood (of a turn)")


CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Lima"}}}


@pytest.mark.parametrize("shape", ["chatml", "smollm3"])
def test_a_call_that_leaves_nothing_of_its_answer_rejects_the_row(
    tmp_path: Path, templates: dict[str, Template], shape: str
) -> None:
    turns = [USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}]
    path = made.write(tmp_path / "rows.jsonl", [{"messages": turns}])
    result = made.prepared(path, templates[shape], holdout=0.0)
    assert "shows nothing of an answer" in made.found(result, "D013").message and not len(result.train)
    spoken = made.write(tmp_path / "spoken.jsonl", [{"messages": [USER, {**turns[1], "content": "Let me see."}]}])
    assert "D013" not in made.codes(made.prepared(spoken, templates[shape], holdout=0.0))


def test_what_a_system_turn_holds_beside_its_text_is_used_or_listed(tmp_path: Path) -> None:
    tools = [{"name": "weather", "parameters": {"type": "object"}}]
    head = {"role": "system", "content": "Be brief.", "tools": tools, "name": "Ann", "mood": None}
    path = made.write(tmp_path / "rows.jsonl", [{"messages": [head, USER, ASSISTANT]}])
    result = made.prepared(path, holdout=0.0)
    assert result.train.record(0).tools == parse_rows([{"messages": [USER, ASSISTANT], "tools": tools}])[0].tools
    assert made.found(result, "D037").message == "columns that are not used: name (of a turn)"


def test_a_result_that_holds_the_templates_own_marks_is_told(tmp_path: Path) -> None:
    found = {"from": "tool", "value": "<tool_response>\n21 C\n</tool_response>"}
    turns = [
        {"from": "human", "value": "ask"},
        {"from": "gpt", "value": "call"},
        found,
        {"from": "gpt", "value": "say"},
    ]
    result = made.prepared(made.write(tmp_path / "rows.jsonl", [{"conversations": turns}] * 2), holdout=0.0)
    assert made.found(result, "D040").count == 2 and "P5" not in made.codes(result)
    plain = [*turns[:2], {**found, "value": "21 C"}, turns[3]]
    assert "D040" not in made.codes(made.prepared(made.write(tmp_path / "b.jsonl", [{"conversations": plain}])))


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_two_columns_of_one_name_are_an_error(tmp_path: Path, suffix: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_arrays(
        [pa.array(["ask"]), pa.array(["say"]), pa.array(["no"])], ["prompt", "completion", "completion"]
    )
    path = tmp_path / f"rows{suffix}"
    if suffix == ".parquet":
        pq.write_table(table, path)
    else:
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as out:
            out.write_table(table)
    with pytest.raises(DataError, match="two columns named 'completion'"):
        made.prepared(path)


def test_lines_that_end_with_cr_alone_are_read(tmp_path: Path) -> None:
    table = made.write(tmp_path / "a.csv", b"prompt,completion\rask,say\rask,say\r")
    lines = made.write(tmp_path / "a.jsonl", b'{"prompt": "ask", "completion": "say"}\r' * 2)
    for path in (table, lines):
        result = made.prepared(path, holdout=0.0)
        assert told(result) == [TOLD, TOLD] and "CR line ends" in made.found(result, "D009").message
        assert result.train.source(1).endswith(f"{path.name}:{2 + (path.suffix == '.csv')}")


def test_a_sheet_in_a_folder_of_rows_is_named_as_left_out(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    made.write(tmp_path / "data" / "a.jsonl", [{"prompt": "ask", "completion": "say"}])
    for name in ("b.xlsx", "c.zip", "README.md"):
        (tmp_path / "data" / name).write_bytes(b"PK\x03\x04")
    found = made.found(made.prepared(tmp_path / "data", holdout=0.0), "D052")
    assert found.count == 2 and "b.xlsx" in found.message and "c.zip" in found.message


def run(fix: str, folder: Path) -> dict[str, str]:
    """Run the command in a fix; the `--map` pairs that it names."""
    begin = re.search(r"python -[cm]|mv |bunzip2|unxz", fix)
    assert begin, fix
    command, _, then = fix[begin.start() :].partition(" && lorafit ")
    command = re.sub(r"^python ", f"{shlex.quote(sys.executable)} ", command.partition(", and name")[0].strip(")"))
    subprocess.run(command, shell=True, check=True, cwd=folder)
    return dict(word.split("=", 1) for flag, word in pairwise(shlex.split(then)) if flag == "--map")


PAIR = {"prompt": "ask", "completion": "say"}
QUOTED = str([USER, ASSISTANT]).replace('"', '""')
REWRITTEN: dict[str, tuple[str, bytes, str]] = {
    "rows under names": ("a.json", json.dumps({"one": PAIR, "two": PAIR}).encode(), "under a name of its own"),
    "rows under numbers": (
        "a.json",
        json.dumps({"0": {**PAIR, "id": 1}, "1": {**PAIR, "id": 2}}, indent=1).encode(),
        "under a name of its own",
    ),
    "UltraChat": ("a.jsonl", made.jsonl([{"id": "1", "data": ["ask", "say"]}] * 2), "texts without roles"),
    "SQuAD": (
        "a.jsonl",
        made.jsonl([{"id": "1", "question": "ask", "answers": {"text": ["say"], "answer_start": [0]}}] * 2),
        "questions about a text",
    ),
    "Python's own lists in CSV": ("a.csv", f'messages\n"{QUOTED}"\n"{QUOTED}"\n'.encode(), "not a list of turns"),
}


@pytest.mark.parametrize("case", REWRITTEN)
def test_the_command_for_another_container_works_as_printed(tmp_path: Path, case: str) -> None:
    name, content, what = REWRITTEN[case]
    path = made.write(tmp_path / name, content)
    try:
        found = made.found(made.prepared(path, holdout=0.0), "D012")
        message, fix = found.message, found.fix
    except LorafitError as error:
        message, fix = str(error), str(error.fix)
    assert what in message
    pairs = run(fix, tmp_path)
    assert told(made.prepared(tmp_path / "rows.jsonl", holdout=0.0, field_map=pairs)) == [TOLD, TOLD]


def test_a_file_named_as_another_kind_is_named_by_its_content(tmp_path: Path) -> None:
    packed = gzip.compress(made.jsonl([PAIR]))
    with pytest.raises(DataError, match="gzip file by its first bytes") as caught:
        made.prepared(made.write(tmp_path / "a.jsonl", packed))
    run(str(caught.value.fix), tmp_path)
    assert told(made.prepared(tmp_path / "a.jsonl.gz", holdout=0.0)) == [TOLD]
    with pytest.raises(DataError, match="Excel workbook"):
        made.prepared(made.write(tmp_path / "a.csv", b"PK\x03\x04 and so on"))


def test_the_command_that_unpacks_an_archive_works_as_printed(tmp_path: Path) -> None:
    import bz2
    import zipfile

    with zipfile.ZipFile(tmp_path / "rows.zip", "w") as archive:
        archive.writestr("inside.jsonl", made.jsonl([PAIR]))
    made.write(tmp_path / "other.jsonl.bz2", bz2.compress(made.jsonl([PAIR])))
    for packed, inside in (("rows.zip", "inside.jsonl"), ("other.jsonl.bz2", "other.jsonl")):
        with pytest.raises(DataError, match="unpack it") as caught:
            made.prepared(tmp_path / packed)
        if packed.endswith(".zip"):
            run(str(caught.value.fix), tmp_path)
        else:
            made.write(tmp_path / inside, bz2.decompress((tmp_path / packed).read_bytes()))
        assert told(made.prepared(tmp_path / inside, holdout=0.0)) == [TOLD]


@pytest.mark.parametrize(
    ("content", "fix"),
    [
        (b"# exported\nprompt,completion\nask,say\n", "delete the lines above"),
        (b"My data,,\nprompt,completion,note\nask,say,x\n", "delete the lines above"),
        (b"prompt,completion\nask, b,say\n", "quote cells"),
    ],
)
def test_a_title_above_a_table_is_told_from_a_missing_quote(tmp_path: Path, content: bytes, fix: str) -> None:
    result = made.prepared(made.write(tmp_path / "a.csv", content), holdout=0.0)
    assert fix in made.found(result, "D008").fix


def test_a_table_without_column_names_is_told_as_such(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="above the first row"):
        made.prepared(made.write(tmp_path / "a.csv", b"2+2?,4\n3+3?,6\n"))
    result = made.prepared(made.write(tmp_path / "b.csv", b"prompt,completion\n2+2?,4\n3+3?,6\n"), holdout=0.0)
    assert len(result.train) == 2


def test_a_column_about_the_rows_is_never_suggested_as_their_answer(tmp_path: Path) -> None:
    row = {"doc_id": "x1", "my question": "ask", "source": "web", "my text": "say"}
    with pytest.raises(DataError, match="none of instruction") as caught:
        made.prepared(made.write(tmp_path / "a.jsonl", [row, row]))
    assert "doc_id" not in str(caught.value.fix) and "my text" in str(caught.value.fix)


def test_an_answer_beside_the_turns_is_mapped_as_the_fix_says(tmp_path: Path) -> None:
    path = made.write(tmp_path / "a.jsonl", [{"messages": [USER], "output": "say"}])
    fix = made.found(made.prepared(path, holdout=0.0), "D016").fix
    assert fix.startswith("--map prompt=messages ")
    assert told(made.prepared(path, holdout=0.0, field_map={"prompt": "messages"})) == [TOLD]


@pytest.mark.parametrize("content", [[[USER, ASSISTANT]], [[USER, ASSISTANT], [USER, ASSISTANT]]], ids=len)
def test_lists_of_turns_without_a_name_are_told_how_to_be_written(tmp_path: Path, content: Any) -> None:
    result = made.prepared(made.write(tmp_path / "a.json", json.dumps(content).encode()), holdout=0.0)
    assert '{"messages": …}' in made.found(result, "D002").fix
    mended = made.write(tmp_path / "b.json", json.dumps([{"messages": one} for one in content]).encode())
    assert told(made.prepared(mended, holdout=0.0)) == [TOLD] * len(content)
