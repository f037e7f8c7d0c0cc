# ruff: noqa: E501
"""Files as other tools write them: what is read, what is refused by name, and that every fix works when it is done."""

import json
import re
import shlex
import subprocess
import sys
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest

import made_data as made
from lorafit.config import resolve
from lorafit.data import Prepared
from lorafit.data.sources.discovery import find_files
from lorafit.data.sources.reader import RowReader
from lorafit.errors import DataError, UsageError
from template_shapes import template_of

PAIR = {"prompt": "2+2?", "completion": "4"}


def rows_of(result: Prepared) -> list[tuple[str, ...]]:
    """What each row asks and answers."""
    return [tuple(turn.content for turn in result.train.record(place).turns) for place in range(len(result.train))]


def read(path: Path, **settings: Any) -> list[tuple[str, ...]]:
    return rows_of(made.prepared(path, **{"holdout": 0.0, **settings}))


@pytest.mark.parametrize(
    ("content", "count"),
    [
        (b",prompt,completion\n0,2+2?,4\n1,3+3?,6\n", 2),
        (b"sep=;\nprompt;completion\n2+2?;4\n", 1),
        (b"\xef\xbb\xbfsep=;\r\nprompt;completion\r\n2+2?;4\r\n", 1),
        (b"prompt;completion;;\n2+2?;4;;\n;;;\n", 1),
        (b"prompt;completion\n2+2?;4\n;\n;\n", 1),
        (b"prompt,completion\n2+2?,4\n,,\n", 1),
        (b"prompt\tcompletion\n2+2?\t4\n", 1),
        (b'id,messages\n1,"[{""role"": ""user"", ""content"": ""2+2?""}, {""role"": ""assistant"", ""content"": ""4""}]"\n', 1),
    ],
)  # fmt: skip
def test_tables_as_excel_and_pandas_write_them_are_read(tmp_path: Path, content: bytes, count: int) -> None:
    result = made.prepared(made.write(tmp_path / "rows.csv", content), holdout=0.0)
    assert rows_of(result)[0] == ("2+2?", "4")
    assert (len(result.train), result.summary.rejected) == (count, 0)


ROWS = [["prompt", "completion"], ["Wie, groß; ist|es?", 'Grüße "é"'], ["3+3?", "6"]]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "cp1252"])
def test_every_order_of_mark_separator_line_delimiter_quotes_and_line_end_is_read(
    tmp_path: Path, encoding: str
) -> None:
    said = ["", "sep={}", '"sep={}"', "SEP={}", "sep={}{}{}"]
    for number, (sep, mark, quoted, end, trailing) in enumerate(
        product(said, ",;\t|", (False, True), ("\n", "\r\n", "\r"), (0, 2))
    ):
        cells = [
            ['"{}"'.format(one.replace('"', '""')) if quoted or set(one) & set(',;|"') else one for one in row]
            for row in ROWS
        ]
        lines = [
            *([sep.format(*mark * 3)] if sep else []),
            *(mark.join(row) + mark * trailing for row in cells),
            mark * trailing,
        ]
        path = tmp_path / f"{number}.csv"
        path.write_bytes(end.join(lines).encode(encoding))
        reader = RowReader(find_files([str(path)], encoding="cp1252" if encoding == "cp1252" else None))
        assert [row.fields for row in reader] == [dict(zip(ROWS[0], row)) for row in ROWS[1:]], lines


@pytest.mark.parametrize(
    "content",
    [
        b'"prompt, or question";"completion"\n"a, b";c\n',
        b"prompt (a, b);completion\nx;y\n",
        b"\n\r\nprompt,completion\na,b\n",
        b"sep=;\n\xef\xbb\xbfprompt;completion\na;b\n",
        b"sep=\\t\nprompt\tcompletion\na\tb\n",
        b'prompt,completion\n"a;\nb",c\n',
    ],
)
def test_the_header_decides_on_the_separator(tmp_path: Path, content: bytes) -> None:
    (row,) = RowReader(find_files([str(made.write(tmp_path / "rows.csv", content))]))
    assert row.fields is not None and len(row.fields) == 2 and "\ufeff" not in "".join(row.fields)


def test_marks_of_files_that_were_appended_are_read_past(tmp_path: Path) -> None:
    content = b'\xef\xbb\xbf{"prompt": "a", "completion": "b"}\n\xef\xbb\xbf{"prompt": "c", "completion": "d"}\n'
    assert read(made.write(tmp_path / "rows.jsonl", content)) == [("a", "b"), ("c", "d")]


def test_the_line_of_a_row_counts_the_separator_line(tmp_path: Path) -> None:
    result = made.prepared(made.write(tmp_path / "rows.csv", b"sep=;\nprompt;completion\n2+2?;4\n"), holdout=0.0)
    assert result.train.source(0).endswith("rows.csv:3")


def save_split(folder: Path, pairs: list[tuple[str, str]]) -> None:
    """A split as `datasets.save_to_disk` lays it out."""
    import pyarrow as pa

    folder.mkdir(parents=True)
    asked, answered = zip(*pairs)
    table = pa.table({"prompt": list(asked), "completion": list(answered)})
    for name, part in (("data-00000-of-00001.arrow", table), ("cache-0123456789abcdef.arrow", table)):
        with pa.OSFile(str(folder / name), "wb") as sink, pa.ipc.new_stream(sink, part.schema) as stream:
            stream.write_table(part)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}))
    (folder / "dataset_info.json").write_text(json.dumps({"features": {}}))


def test_a_dataset_saved_to_disk_is_read_without_its_notes_and_caches(tmp_path: Path) -> None:
    save_split(tmp_path / "saved", [("2+2?", "4"), ("3+3?", "6")])
    assert read(tmp_path / "saved") == [("2+2?", "4"), ("3+3?", "6")]


def test_a_dataset_dict_on_disk_is_trained_on_its_train_split(tmp_path: Path) -> None:
    for split, pair in (("train", ("a", "b")), ("test", ("c", "d")), ("validation", ("e", "f"))):
        save_split(tmp_path / "saved" / split, [pair])
    (tmp_path / "saved" / "dataset_dict.json").write_text('{"splits": ["train", "test", "validation"]}')
    result = made.prepared(tmp_path / "saved")
    assert rows_of(result) == [("a", "b")]
    assert [result.holdout.record(0).response, len(result.holdout)] == ["f", 1]


def split_folder(tmp_path: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        made.write(tmp_path / name, [made.row(number)])
    return tmp_path


@pytest.mark.parametrize("held", ["validation", "valid", "val", "dev", "eval"])
@pytest.mark.parametrize("layout", ["{}.jsonl", "{}/rows.jsonl", "my-{}-00000-of-00001.jsonl"])
def test_names_in_a_folder_say_which_split_a_file_is(tmp_path: Path, held: str, layout: str) -> None:
    folder = split_folder(tmp_path / "data", *(layout.format(name) for name in ("train", held, "test")))
    result = made.prepared(folder)
    assert [rows.source(0).rpartition("/data/")[2] for rows in (result.train, result.holdout)] == [
        f"{layout.format('train')}:1",
        f"{layout.format(held)}:1",
    ]
    assert (len(result.train), len(result.holdout)) == (1, 1)
    assert layout.format("test") in made.found(result, "D052").message


def test_files_that_are_named_one_by_one_are_all_trained_on(tmp_path: Path) -> None:
    split_folder(tmp_path, "train.jsonl", "test.jsonl")
    data = [str(tmp_path / name) for name in ("train.jsonl", "test.jsonl")]
    assert len(made.prepared(tmp_path / "train.jsonl", data=data, holdout=0.0).train) == 2


def test_a_folder_without_a_train_side_is_an_error_that_names_the_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing is left to train on.*test\.jsonl"):
        made.prepared(split_folder(tmp_path / "data", "test.jsonl"))


def test_a_file_that_holdout_names_is_not_trained_on(tmp_path: Path) -> None:
    folder = split_folder(tmp_path / "data", "a.jsonl", "b.jsonl", "validation.jsonl")
    result = made.prepared(folder, holdout=str(folder / "b.jsonl"))
    assert (len(result.train), result.holdout.source(0).endswith("b.jsonl:1")) == (1, True)


@pytest.mark.parametrize("shape", ["qwen2_5", "llama2", "harmony"])
def test_the_same_conversation_in_every_container_and_spelling_gives_the_same_ids(tmp_path: Path, shape: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    turns = [("user", "Grüße?"), ("assistant", "Ja,\n  „so“."), ("user", "And?"), ("assistant", "No.")]
    messages = [{"role": role, "content": text} for role, text in turns]
    spoken = [{"from": {"user": "human", "assistant": "gpt"}[role], "value": text} for role, text in turns]
    alpaca = {"instruction": "And?", "input": "", "output": "No.", "history": [["Grüße?", "Ja,\n  „so“."]]}
    cell = json.dumps(messages).replace('"', '""')
    table = pa.table({"messages": [messages]})
    pq.write_table(table, tmp_path / "f.parquet")
    (tmp_path / "saved").mkdir()
    with pa.OSFile(str(tmp_path / "saved" / "data.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as out:
        out.write_table(table)
    (tmp_path / "saved" / "state.json").write_text("{}")
    paths = [
        made.write(tmp_path / "a.jsonl", [{"messages": messages}]),
        made.write(tmp_path / "b.jsonl", [{"conversations": spoken}]),
        made.write(tmp_path / "c.jsonl", [alpaca]),
        made.write(
            tmp_path / "g.jsonl", [{"conversations": [{"input": "Grüße?", "output": turns[1][1]}, *messages[2:]]}]
        ),
        made.write(tmp_path / "d.json", json.dumps([{"messages": messages}], indent=1).encode("utf-16")),
        made.write(tmp_path / "e.csv", f'messages\n"{cell}"\n'.encode()),
        tmp_path / "f.parquet",
        tmp_path / "saved",
    ]
    template = template_of(tmp_path / "base", shape)
    stores = [made.prepared(path, template, holdout=0.0).train for path in paths]
    assert len({rows.content_hash for rows in stores}) == 1 and len(stores[0]) == 1


REFUSED: list[tuple[str, bytes, str]] = [
    (
        "wrapped.json",
        b'{"version": "1", "data": [{"prompt": "2+2?", "completion": "4"}]}',
        "whose 'data' holds the rows",
    ),
    ("pretty.json", json.dumps({"version": "1", "rows": [PAIR]}, indent=1).encode(), "whose 'rows' holds the rows"),
    ("pandas.json", b'{"prompt": {"0": "2+2?", "1": "3+3?"}, "completion": {"0": "4", "1": "6"}}', "table by columns"),
    ("lists.json", b'{"prompt": ["2+2?", "3+3?"], "completion": ["4", "6"]}', "table by columns"),
]


@pytest.mark.parametrize(("name", "content", "what"), REFUSED)
def test_the_line_that_unpacks_a_container_works(tmp_path: Path, name: str, content: bytes, what: str) -> None:
    with pytest.raises(DataError, match=what) as caught:
        read(made.write(tmp_path / name, content))
    command = re.sub("^python", shlex.quote(sys.executable), str(caught.value.fix))
    subprocess.run(command, shell=True, check=True, cwd=tmp_path)
    assert read(tmp_path / "rows.jsonl")[0] == ("2+2?", "4")


def test_the_line_that_takes_the_better_answers_out_works(tmp_path: Path) -> None:
    row = {
        "input": {"messages": [{"role": "user", "content": "ask"}], "tools": [], "parallel_tool_calls": True},
        "preferred_output": [{"role": "assistant", "content": "say"}],
        "non_preferred_output": [{"role": "assistant", "content": "no"}],
    }
    with pytest.raises(DataError, match="preference data") as caught:
        read(made.write(tmp_path / "a.jsonl", [row]))
    line = str(caught.value.fix).partition("answers: ")[2]
    subprocess.run(re.sub("^python", shlex.quote(sys.executable), line), shell=True, check=True, cwd=tmp_path)
    assert read(tmp_path / "rows.jsonl") == [("ask", "say")]


def test_the_map_for_an_export_of_argilla_works(tmp_path: Path) -> None:
    path = made.write(
        tmp_path / "a.jsonl", [{"instruction": "ask", "response": [{"value": "x"}], "response-suggestion": "say"}]
    )
    fix = made.found(made.prepared(path, holdout=0.0, on_bad="drop"), "D012").fix
    assert read(path, map=dict([fix.removeprefix("--map ").split("=")])) == [("ask", "say")]


def test_a_conversation_in_one_text_is_named(tmp_path: Path) -> None:
    path = made.write(tmp_path / "a.jsonl", [{"system": "S", "chat": "USER: 2+2?\n\nASSISTANT: 4"}])
    with pytest.raises(DataError, match=r"'chat' holds a whole conversation as one text.*--map text=chat"):
        read(path)
    assert read(path, map={"text": "chat"}, ignore=["D038"]) == [("USER: 2+2?\n\nASSISTANT: 4",)]


MAPPED: list[tuple[dict[str, Any], str]] = [
    ({"input": "ask", "output": "say"}, "none of instruction"),
    ({"Question": "ask", "Response": "say"}, "none of instruction"),
    ({"question": "ask", "answer": "say"}, "none of instruction"),
    ({"id": 1, "left": "ask", "right": "say"}, "none of instruction"),
    ({"my question": "ask", "my answer": "say"}, "none of instruction"),
    ({"chat": [{"role": "user", "content": "ask"}, {"role": "assistant", "content": "say"}]}, "none of instruction"),
    ({"prompt": "ask", "chosen": "say", "rejected": "no"}, "preference data"),
    ({"question": "ask", "chosen": "say", "rejected": "no"}, "preference data"),
    (
        {
            "chosen": [{"role": "user", "content": "ask"}, {"role": "assistant", "content": "say"}],
            "rejected": [{"role": "user", "content": "ask"}, {"role": "assistant", "content": "no"}],
        },
        "preference data",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("row", "what"), MAPPED)
def test_the_map_that_an_error_suggests_reads_the_rows(tmp_path: Path, row: dict[str, Any], what: str) -> None:
    path = made.write(tmp_path / "rows.jsonl", [row, row])
    with pytest.raises(DataError, match=what) as caught:
        read(path)
    words = shlex.split(str(caught.value.fix))
    pairs = [word.split("=", 1) for flag, word in pairwise(words) if flag == "--map"]
    assert read(path, map=dict(pairs))[0] == ("ask", "say")


def test_a_mapped_field_is_no_longer_read_under_its_own_name(tmp_path: Path) -> None:
    path = made.write(tmp_path / "rows.jsonl", [{"input": "ask", "output": "say"}])
    assert read(path, map={"instruction": "input"}) == [("ask", "say")]
    swapped = made.write(tmp_path / "swapped.jsonl", [{"prompt": "say", "completion": "ask"}])
    assert read(swapped, map={"prompt": "completion", "completion": "prompt"}) == [("ask", "say")]
    with pytest.raises(UsageError, match="is mapped twice"):
        read(path, map={"instruction": "input", "input": "input"})


def test_several_answers_are_an_error_until_one_is_chosen(tmp_path: Path) -> None:
    row = {"prompt": "ask", "response": "draft", "answer": "say", "output": "other"}
    path = made.write(tmp_path / "rows.jsonl", [row])
    result = made.prepared(path, holdout=0.0)
    assert "--map response=NAME" in made.found(result, "D038").fix
    assert read(path, map={"response": "answer"}) == [("ask", "say")]
    assert read(path, map={"response": "response"}) == [("ask", "draft")]
    assert read(path, ignore=["D038"]) == [("ask", "draft")]


@pytest.mark.parametrize("more", [{"question": "which?"}, {"image": "x.png"}, {"documents": [{"text": "x"}]}])
def test_a_field_of_known_meaning_is_never_lost_in_silence(tmp_path: Path, more: dict[str, Any]) -> None:
    path = made.write(tmp_path / "rows.jsonl", [{**PAIR, **more}])
    assert made.found(made.prepared(path, holdout=0.0, on_bad="drop"), "D038").count == 1
    assert read(path, ignore=["D038"]) == [("2+2?", "4")]


def test_a_prompt_that_only_repeats_the_first_turn_is_no_loss(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "ask"}, {"role": "assistant", "content": "say"}]
    result = made.prepared(
        made.write(tmp_path / "a.jsonl", [{"messages": turns, "prompt": "ask", "topic": "x"}]), holdout=0.0
    )
    assert "D038" not in made.codes(result)
    assert made.found(result, "D037").message == "columns that are not used: prompt, topic"


def test_a_file_of_windows_is_read_when_its_encoding_is_named(tmp_path: Path) -> None:
    path = made.write(tmp_path / "rows.csv", "prompt;completion\nGrüße?;„ja“\n".encode("cp1252"))
    fault = made.found(made.prepared(path, holdout=0.0, on_bad="drop"), "D004")
    setting, _, value = re.search(r"--set (\w+)(=)(\w+)", fault.fix).groups()  # type: ignore[union-attr]
    result = made.prepared(path, holdout=0.0, **{setting: value})
    assert rows_of(result) == [("Grüße?", "„ja“")]
    assert "cp1252 text" in made.found(result, "D009").message
    with pytest.raises(UsageError, match="'klingon' is no encoding"):
        resolve({}, {"encoding": "klingon"})


@pytest.mark.parametrize(
    ("content", "code", "mended"),
    [
        (b'prompt,completion\n"say \\"hi\\"",4\n', "D053", b'prompt,completion\n"say ""hi""",4\n'),
        (b'prompt,completion\n"5 inch,4\n', "D053", b'prompt,completion\n"5 inch",4\n'),
        (b"prompt,completion\na, b,4\n", "D008", b'prompt,completion\n"a, b",4\n'),
    ],
)
def test_the_fix_of_a_broken_table_works(tmp_path: Path, content: bytes, code: str, mended: bytes) -> None:
    broken = made.prepared(made.write(tmp_path / "rows.csv", content), holdout=0.0, on_bad="drop")
    assert "quote" in made.found(broken, code).fix
    assert len(read(made.write(tmp_path / "rows.csv", mended))) == 1


@pytest.mark.parametrize(
    ("name", "kind"), [("a.xlsx", "Excel workbook"), ("a.txt", "text file"), ("a.ods", "LibreOffice")]
)
def test_files_of_other_programs_are_named_as_such(tmp_path: Path, name: str, kind: str) -> None:
    with pytest.raises(DataError, match=kind):
        read(made.write(tmp_path / name, b"PK\x03\x04"))
