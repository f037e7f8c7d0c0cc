"""Groups: what gives another row away stands on its side."""

import json
from pathlib import Path

import made_data as made
from lorafit.data.checks.whole_set import group_of
from lorafit.data.prepare import Prepared
from lorafit.data.store import Stored


def groups(path: Path, rows: list[dict[str, str]]) -> list[int]:
    result = made.prepared(made.write(path / "rows.jsonl", rows))
    return group_of(stored(result)).tolist()


def stored(result: Prepared) -> Stored:
    folder = result.train.store.folder
    assert folder is not None
    return Stored.open(folder)


LONG = " ".join(f"term{number}" for number in range(40))


def test_near_copies_are_one_group(tmp_path: Path) -> None:
    rows = [made.row(0, input=LONG), made.row(1), made.row(0, input=LONG.replace("term20", "other"))]
    assert groups(tmp_path, rows) == [0, 1, 0]


def test_rows_that_differ_in_case_and_blanks_are_one_group(tmp_path: Path) -> None:
    rows = [{"prompt": "Hi there", "completion": "Yes"}, {"prompt": "hi  THERE\n", "completion": " yes"}]
    assert groups(tmp_path, [*rows, {"prompt": "ho", "completion": "no"}]) == [0, 0, 2]


def test_rows_with_one_prompt_are_one_group(tmp_path: Path) -> None:
    rows = [made.row(number) for number in range(40)]
    rows[30] = {**rows[3], "response": "something else entirely"}
    assert groups(tmp_path, rows)[30] == 3


def test_a_prompt_that_most_rows_have_ties_nothing(tmp_path: Path) -> None:
    rows = [{"prompt": "Tell me a joke", "completion": f"joke a{n} b{n} c{n} d{n} e{n}"} for n in range(30)]
    assert groups(tmp_path, rows) == list(range(30))


def test_one_long_instruction_for_all_rows_does_not_make_one_group(tmp_path: Path) -> None:
    rows = [made.row(number, instruction=LONG * 3) for number in range(60)]
    assert groups(tmp_path, rows) == list(range(60))


def test_copies_across_files_are_one_group(tmp_path: Path) -> None:
    one = made.write(tmp_path / "a.jsonl", [made.row(0), made.row(1)])
    made.write(tmp_path / "b.jsonl", [made.row(1), made.row(2)])
    result = made.prepared(one.parent / "*.jsonl")
    assert group_of(stored(result)).tolist() == [0, 1, 1, 3]
    assert json.loads((tmp_path / "b.jsonl").read_text().splitlines()[0]) == made.row(1)
