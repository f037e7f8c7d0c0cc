"""fix_rows: mechanical faults go, everything else stays to the letter."""

import json
from pathlib import Path
from typing import Any

import pytest

import made_data as made
from lorafit.config import resolve
from lorafit.data import FixReport, fix_rows
from lorafit.errors import DataError


def fix(path: Path, out: Path) -> FixReport:
    return fix_rows(resolve({}, {"data": str(path)}).config, out)


def fixed(path: Path, rows: bytes | list[dict[str, Any]]) -> tuple[list[Any], FixReport]:
    out = path / "out.jsonl"
    report = fix(made.write(path / "in.jsonl", rows), out)
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()], report


def test_texts_are_trimmed_line_ends_unified_and_controls_removed(tmp_path: Path) -> None:
    rows, report = fixed(tmp_path, [{"instruction": "  a\r\nb\rc ", "response": "x\x07y"}, made.row(1)])
    assert rows == [{"instruction": "  a\nb\nc", "response": "xy"}, made.row(1)]
    assert (report.trimmed, report.newlines, report.controls) == (1, 1, 1)
    assert report.changes == "1 rows trimmed, 1 with line ends mended, 1 without control characters"


def test_a_file_without_mechanical_faults_is_said_to_have_none(tmp_path: Path) -> None:
    rows, report = fixed(tmp_path, [{"instruction": "a", "response": "b", "id": 5}, made.row(1)])
    assert len(rows) == 2 and report.changes == "nothing"


def test_what_was_read_past_in_the_file_is_among_what_was_fixed(tmp_path: Path) -> None:
    line = json.dumps(made.row(1)).encode()
    rows, report = fixed(tmp_path, b"\xef\xbb\xbf" + line + b"\r\n\r\n")
    assert rows == [made.row(1)]
    assert report.changes == "1 × byte order mark, 2 × CRLF line end, 1 × blank line"


def test_raw_control_characters_that_break_the_json_are_removed(tmp_path: Path) -> None:
    rows, report = fixed(tmp_path, b'{"instruction": "a\0b", "response": "c\x01"}\n')
    assert rows == [{"instruction": "ab", "response": "c"}]
    assert (report.controls, report.rejected) == (1, 0)


def test_exact_copies_are_written_once(tmp_path: Path) -> None:
    rows, report = fixed(tmp_path, [made.row(1), made.row(2), {**made.row(1), "input": made.row(1)["input"] + " "}])
    assert rows == [made.row(1), made.row(2)]
    assert (report.read, report.written, report.duplicates) == (3, 2, 1)


def test_other_fields_and_nested_texts_are_kept_and_mended(tmp_path: Path) -> None:
    row = {
        "messages": [{"role": "user", "content": "a "}, {"role": "assistant", "content": "b"}],
        "id": 7,
        "tags": [1.5],
    }
    rows, _ = fixed(tmp_path, [row])
    assert rows == [{**row, "messages": [{"role": "user", "content": "a"}, row["messages"][1]]}]


def test_rows_that_cannot_be_read_are_set_aside_with_the_reason(tmp_path: Path) -> None:
    rows, report = fixed(tmp_path, made.jsonl([made.row(1)]) + b"{broken\n")
    assert rows == [made.row(1)]
    assert report.rejected == 1
    assert report.rejected_file is not None
    assert json.loads(Path(report.rejected_file).read_text())["raw"] == "{broken"
    assert report.read == report.written + report.duplicates + report.rejected


def test_a_fixed_file_has_nothing_left_to_fix(tmp_path: Path) -> None:
    content = b"\xef\xbb\xbf" + made.jsonl([made.row(1, input=" x\x07\r\n y"), made.row(2), made.row(2)]) + b"\r\n"
    path = made.write(tmp_path / "in.jsonl", content)
    fix(path, tmp_path / "out.jsonl")
    assert made.codes(made.prepared(tmp_path / "out.jsonl", holdout=0.0)) == set()
    again = fix(tmp_path / "out.jsonl", tmp_path / "twice.jsonl")
    assert (again.trimmed, again.newlines, again.controls, again.duplicates) == (0, 0, 0, 0)
    assert (tmp_path / "twice.jsonl").read_bytes() == (tmp_path / "out.jsonl").read_bytes()


def test_the_input_is_never_written_over(tmp_path: Path) -> None:
    path = made.write(tmp_path / "in.jsonl", [made.row(1)])
    with pytest.raises(DataError, match="is an input of this command"):
        fix(path, path)


def test_a_file_that_is_there_is_never_written_over(tmp_path: Path) -> None:
    path, other = made.write(tmp_path / "in.jsonl", [made.row(1)]), made.write(tmp_path / "out.jsonl", b"precious")
    with pytest.raises(DataError, match="is there already"):
        fix(path, other)
    assert other.read_bytes() == b"precious"


def test_a_folder_that_is_not_there_is_one_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    path = made.write(tmp_path / "in.jsonl", [made.row(1)])
    with pytest.raises(DataError, match="cannot be written"):
        fix(path, tmp_path / "no" / "out.jsonl")
    assert [file.name for file in tmp_path.iterdir()] == ["in.jsonl"]


def test_a_failed_fix_leaves_nothing_half_written(tmp_path: Path) -> None:
    path = made.write(tmp_path / "in.json", b'{"data": [\n1]}')
    with pytest.raises(DataError):
        fix(path, tmp_path / "out.jsonl")
    assert [file.name for file in tmp_path.iterdir()] == ["in.json"]


def test_mapped_fields_are_written_under_the_names_that_need_no_map(tmp_path: Path) -> None:
    path = made.write(tmp_path / "rows.jsonl", [{"Subject": " a ", "Agent Reply": "b", "id": 7}])
    mapped = {"instruction": "Subject", "response": "Agent Reply"}
    fix_rows(resolve({}, {"data": str(path), "field_map": mapped}).config, tmp_path / "clean.jsonl")
    assert json.loads((tmp_path / "clean.jsonl").read_text()) == {"instruction": " a", "response": "b", "id": 7}


def test_an_input_named_like_the_rejected_file_is_never_destroyed(tmp_path: Path) -> None:
    path = made.write(tmp_path / "clean.jsonl.rejected.jsonl", [made.row(1), made.row(2)])
    with pytest.raises(DataError, match="is an input of this command"):
        fix(path, tmp_path / "clean.jsonl")
    assert path.read_bytes() == made.jsonl([made.row(1), made.row(2)])
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_rows_set_aside_earlier_are_never_written_over(tmp_path: Path) -> None:
    path = made.write(tmp_path / "in.jsonl", [made.row(1)])
    earlier = made.write(tmp_path / "out.jsonl.rejected.jsonl", b"precious")
    with pytest.raises(DataError, match="is there already"):
        fix(path, tmp_path / "out.jsonl")
    assert earlier.read_bytes() == b"precious"
    assert not (tmp_path / "out.jsonl").exists()


def test_a_foreign_partial_file_stays_as_it_is(tmp_path: Path) -> None:
    partial = made.write(tmp_path / "out.jsonl.partial", b"precious")
    fix(made.write(tmp_path / "in.jsonl", [made.row(1)]), tmp_path / "out.jsonl")
    assert partial.read_bytes() == b"precious"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl", "out.jsonl.partial"]
