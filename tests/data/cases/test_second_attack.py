"""What a second round of attacks found: one test for each kind, with members that no case file has."""

from pathlib import Path

import pytest

import made_data as made
from lorafit.data import Template, parse_rows
from lorafit.data.checks.rows import token_checks
from lorafit.errors import DataError


def talk(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(texts)]


@pytest.mark.parametrize("train", ["trainData", "TRAIN1", "trainset", "my-train"])
@pytest.mark.parametrize("test", ["testData", "test1", "TestSet", "testset", "TEST"])
@pytest.mark.parametrize("held", ["valData", "dev2", "devset", "held_out", "holdout"])
def test_split_words_are_found_in_names_of_any_style(tmp_path: Path, train: str, test: str, held: str) -> None:
    for number, name in enumerate((train, test, held)):
        made.write(tmp_path / f"{name}.jsonl", [made.row(number)])
    made.write(tmp_path / "~$open.jsonl", b"\0")
    result = made.prepared(tmp_path)
    sources = [rows.source(0).rpartition("/")[2] for rows in (result.train, result.holdout)]
    assert (sources, result.summary.read) == ([f"{train}.jsonl:1", f"{held}.jsonl:1"], 2)


def test_folders_that_a_pattern_reaches_say_their_split_and_the_folder_it_names_does_not(tmp_path: Path) -> None:
    for number, name in enumerate(("train", "test")):
        (tmp_path / name).mkdir()
        made.write(tmp_path / name / "rows.jsonl", [made.row(number)])
    reached = made.prepared(tmp_path, data=str(tmp_path / "**" / "*.jsonl"), holdout=0.0).train
    assert [reached.source(place).endswith("train/rows.jsonl:1") for place in range(len(reached))] == [True]
    assert len(made.prepared(tmp_path, data=str(tmp_path / "test" / "*.jsonl"), holdout=0.0).train) == 1


@pytest.mark.parametrize("blank", ["\u3000", "\u00a0", "\t", "  "])
def test_any_indentation_that_a_template_trims_is_told(templates: dict[str, Template], blank: str) -> None:
    record = parse_rows([{"messages": talk("q", f"{blank}first\nsecond")}])[0]
    seen = {shape: {code for code, _ in token_checks(templates[shape].encode(record))} for shape in ("gemma", "chatml")}
    assert "D027" in seen["gemma"] and "D027" not in seen["chatml"]


def test_a_greeting_with_nothing_before_it_is_context_on_every_kind_of_template(templates: dict[str, Template]) -> None:
    record = parse_rows([{"messages": [{"role": "assistant", "content": "Hello"}, *talk("q", "a")]}])[0]
    for shape in ("smollm3", "chatml", "qwen2_5"):
        one = templates[shape].encode(record)
        taught = [token for token, is_taught in zip(one.ids, one.mask) if is_taught]
        assert templates[shape].tokenizer.decode(taught, skip_special_tokens=False) == "a<|im_end|>"


def test_one_system_text_is_one_whatever_blanks_end_it(tmp_path: Path) -> None:
    rows = [{"system": f"Be kind.{end}", "instruction": f"q{end}x", "output": "a"} for end in ("", " ", "\r\n")]
    assert (
        "Be kind." in made.found(made.prepared(made.write(tmp_path / "rows.jsonl", rows), holdout=0.0), "D049").message
    )


def test_the_fix_of_a_flagged_row_leaves_it_out(tmp_path: Path) -> None:
    rows = [{"prompt": "q", "completion": "a", "label": True}, {"prompt": "r", "completion": "b", "label": False}]
    path = made.write(tmp_path / "rows.jsonl", rows)
    assert "--on-bad drop" in made.found(made.prepared(path, holdout=0.0), "D038").fix
    assert len(made.prepared(path, holdout=0.0, on_bad="drop").train) == 1


def test_faults_of_turns_name_no_flag_that_cannot_reach_them(tmp_path: Path) -> None:
    path = made.write(tmp_path / "rows.jsonl", [{"messages": [{"role": "user", "txt": "q"}, *talk("", "a")[1:]]}])
    assert "--map" not in made.found(made.prepared(path, holdout=0.0), "D010").fix
    assert parse_rows([{"messages": [{"role": "user", "message": "q"}, *talk("", "a")[1:]]}])[0].turns[0].content == "q"


def test_token_ids_are_named_as_such() -> None:
    with pytest.raises(DataError, match="the rows are token ids"):
        parse_rows([{"input_ids": [1, 2], "labels": [1, 2]}])
