"""RowReader: every format and every oddity of a real file, survived and named."""

import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

import made_data as made
from lorafit.data.sources.discovery import find_files
from lorafit.data.sources.files import LINE_LIMIT_BYTES
from lorafit.data.sources.raw_row import RawRow
from lorafit.data.sources.reader import RowReader
from lorafit.errors import DataError

ROWS = [{"instruction": f"ask {n} ü", "response": f"say {n}\n日本"} for n in range(5)]


def read(path: Path) -> list[RawRow]:
    return list(RowReader(find_files([str(path)])))


def fields(rows: list[RawRow]) -> list[dict[str, Any]]:
    return [dict(row.fields) for row in rows if row.fields is not None]


def rejects(rows: list[RawRow]) -> list[tuple[int, str]]:
    return [(row.line, row.reject.code) for row in rows if row.reject is not None]


def as_jsonl() -> bytes:
    return made.jsonl(ROWS)


def as_array() -> bytes:
    return json.dumps(ROWS, indent=2).encode()


def as_csv() -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, ["instruction", "response"])
    writer.writeheader()
    writer.writerows(ROWS)
    return text.getvalue().encode()


def as_parquet() -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(ROWS), sink)
    return sink.getvalue()


@pytest.mark.parametrize("pack", ["", "gz", "zst"])
@pytest.mark.parametrize(
    ("name", "content"),
    [("a.jsonl", as_jsonl()), ("a.json", as_array()), ("a.csv", as_csv()), ("a.parquet", as_parquet())],
)
def test_every_format_gives_the_same_rows_packed_or_not(tmp_path: Path, name: str, content: bytes, pack: str) -> None:
    packed = {"": bytes, "gz": gzip.compress, "zst": zstandard.compress}[pack](content)
    rows = read(made.write(tmp_path / (f"{name}.{pack}" if pack else name), packed))
    assert fields(rows) == ROWS


def test_several_files_come_one_after_the_other(tmp_path: Path) -> None:
    one, other = made.write(tmp_path / "a.jsonl", ROWS[:2]), made.write(tmp_path / "b.jsonl", ROWS[2:])
    rows = list(RowReader(find_files([str(one), str(other)])))
    assert [(row.file, row.line) for row in rows] == [(0, 1), (0, 2), (1, 1), (1, 2), (1, 3)]


def test_a_broken_line_costs_only_itself(tmp_path: Path) -> None:
    rows = read(made.write(tmp_path / "a.jsonl", b'{"a": 1}\n{"a": \n{"a": 3}\n'))
    assert [row.line for row in rows if row.fields] == [1, 3]
    assert rejects(rows) == [(2, "D001")]


def test_a_truncated_last_line_is_named(tmp_path: Path) -> None:
    rows = read(made.write(tmp_path / "a.jsonl", b'{"a": 1}\n{"a": "cut of'))
    assert rejects(rows) == [(2, "D001")]
    assert rows[1].reject is not None
    assert rows[1].reject.reason == "cut off before its end"


@pytest.mark.parametrize(
    ("content", "oddity"),
    [
        (b"\xef\xbb\xbf" + as_jsonl(), "byte order mark"),
        (as_jsonl().replace(b"\n", b"\r\n"), "CRLF line end"),
        (b"\n" + as_jsonl() + b"  \n\n", "blank line"),
        (as_jsonl().decode().encode("utf-16"), "UTF-16 text"),
        (as_jsonl().decode().encode("utf-32"), "UTF-32 text"),
    ],
)
def test_harmless_oddities_cost_no_row_and_are_counted(tmp_path: Path, content: bytes, oddity: str) -> None:
    reader = RowReader(find_files([str(made.write(tmp_path / "a.jsonl", content))]))
    assert fields(list(reader)) == ROWS
    assert reader.file_warnings[0][oddity] >= 1


def test_latin1_lines_are_rejected_and_the_others_read(tmp_path: Path) -> None:
    rows = read(made.write(tmp_path / "a.jsonl", b'{"a": "plain"}\n' + '{"a": "Grüße"}\n'.encode("latin-1")))
    assert rejects(rows) == [(2, "D004")]


def test_a_line_of_fifty_megabytes_is_named_and_the_next_read(tmp_path: Path) -> None:
    huge = b'{"a": "' + b"x" * (50 << 20) + b'"}\n'
    rows = read(made.write(tmp_path / "a.jsonl", huge + b'{"a": 1}\n'))
    assert rejects(rows) == [(1, "D006")]
    assert len(rows[0].raw) == LINE_LIMIT_BYTES
    assert rows[0].reject is not None
    assert "50 MiB" in rows[0].reject.reason
    assert rows[1].fields == {"a": 1}


def test_dates_and_numbers_in_texts_stay_texts(tmp_path: Path) -> None:
    wanted = {"instruction": "2024-01-01", "response": "007"}
    assert fields(read(made.write(tmp_path / "a.jsonl", [wanted]))) == [wanted]
    assert fields(read(made.write(tmp_path / "a.csv", b"instruction,response\n2024-01-01,007\n"))) == [wanted]


def test_an_array_in_a_jsonl_file_is_read_as_one(tmp_path: Path) -> None:
    assert fields(read(made.write(tmp_path / "a.jsonl", as_array()))) == ROWS


def test_an_array_line_among_jsonl_rows_is_one_bad_row(tmp_path: Path) -> None:
    rows = read(made.write(tmp_path / "a.jsonl", b'[{"a": 1}]\n{"a": 2}\n'))
    assert rejects(rows) == [(1, "D002")]
    assert fields(rows) == [{"a": 2}]


def test_jsonl_rows_in_a_json_file_are_read_as_such(tmp_path: Path) -> None:
    assert fields(read(made.write(tmp_path / "a.json", as_jsonl()))) == ROWS


def test_one_object_over_several_lines_is_no_list_of_rows(tmp_path: Path) -> None:
    path = made.write(tmp_path / "a.json", json.dumps({"data": ROWS}, indent=1).encode())
    with pytest.raises(DataError, match="one object whose 'data' holds the rows"):
        read(path)


def test_needless_commas_in_an_array_are_read_past(tmp_path: Path) -> None:
    reader = RowReader(find_files([str(made.write(tmp_path / "a.json", b'[{"a": 1},, {"a": 2},]'))]))
    assert fields(list(reader)) == [{"a": 1}, {"a": 2}]
    assert reader.file_warnings[0] == {"needless comma": 2}


def test_a_csv_line_over_the_limit_is_never_cut_in_silence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("files", "tables"):
        monkeypatch.setattr(f"lorafit.data.sources.{module}.LINE_LIMIT_BYTES", 50)
    body = b"a,b\nlong," + b"x" * 60 + b"\nc,d\n"
    rows = read(made.write(tmp_path / "a.csv", b"instruction,response\n" + body))
    assert rejects(rows) == [(3, "D006")]
    assert len(fields(rows)) == 2


def test_a_cut_off_array_is_an_error_of_its_own(tmp_path: Path) -> None:
    rows = read(made.write(tmp_path / "a.json", b'[{"a": 1},\n{"a": 2}'))
    assert fields(rows) == [{"a": 1}, {"a": 2}]
    assert rejects(rows) == [(2, "D001")]


def test_csv_rows_stand_on_the_line_they_start_on(tmp_path: Path) -> None:
    rows = read(made.write(tmp_path / "a.csv", b'instruction,response\n"two\nlines",b\nc,d\n'))
    assert [(row.line, dict(row.fields or {})) for row in rows] == [
        (2, {"instruction": "two\nlines", "response": "b"}),
        (4, {"instruction": "c", "response": "d"}),
    ]


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
def test_csv_separators_are_seen_in_the_header(tmp_path: Path, separator: str) -> None:
    content = separator.join(["instruction", "response"]) + "\n" + separator.join(["a", "b"]) + "\n"
    assert fields(read(made.write(tmp_path / "a.csv", content.encode()))) == [{"instruction": "a", "response": "b"}]


@pytest.mark.parametrize(
    ("body", "rejected"),
    [
        (b"a,b,c\nd,e\n", [(2, "D008")]),
        (b"a\nd,e\n", [(2, "D008")]),
        (b"\xe9,b\nd,e\n", [(2, "D004")]),
        (b'"a"x,b\nd,e\n', [(2, "D053")]),
    ],
)
def test_bad_csv_rows_are_rejected_and_the_next_read(
    tmp_path: Path, body: bytes, rejected: list[tuple[int, str]]
) -> None:
    rows = read(made.write(tmp_path / "a.csv", b"instruction,response\n" + body))
    assert rejects(rows) == rejected
    assert fields(rows) == [{"instruction": "d", "response": "e"}]


@pytest.mark.parametrize(("header", "what"), [(b"a,a\n", "names the column 'a' twice"), (b",\n", "names no column")])
def test_a_csv_header_must_name_its_columns(tmp_path: Path, header: bytes, what: str) -> None:
    with pytest.raises(DataError, match=what):
        read(made.write(tmp_path / "a.csv", header + b"1,2\n"))


def test_a_csv_cell_under_no_name_is_rejected_unless_it_is_an_index(tmp_path: Path) -> None:
    rows = read(made.write(tmp_path / "a.csv", b",instruction,,response\n0,a,,b\nx,a,,b\n1,a,lost,b\n"))
    assert fields(rows) == [{"instruction": "a", "response": "b"}]
    assert rejects(rows) == [(3, "D008"), (4, "D008")]


def test_a_broken_parquet_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is no readable Parquet file"):
        read(made.write(tmp_path / "a.parquet", b"PAR1 nothing"))


def test_a_packed_file_that_is_cut_off_is_one_sentence(tmp_path: Path) -> None:
    path = made.write(tmp_path / "a.jsonl.gz", gzip.compress(as_jsonl())[:-12])
    with pytest.raises(DataError, match="damaged or cut off"):
        read(path)


def test_nulls_that_parquet_puts_into_messages_are_taken_out(tmp_path: Path) -> None:
    call = {"role": "assistant", "content": "b", "name": "n"}
    rows = [{"messages": [{"role": "user", "content": "a", "name": None}, call]}]
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    read_back = fields(read(made.write(tmp_path / "a.parquet", sink.getvalue())))
    assert read_back == [{"messages": [{"role": "user", "content": "a"}, call]}]


def test_progress_ends_at_the_bytes_of_all_files(tmp_path: Path) -> None:
    reader = RowReader(find_files([str(made.write(tmp_path / "a.jsonl.gz", gzip.compress(as_jsonl())))]))
    assert list(reader)
    assert reader.bytes_done == reader.bytes_total > 0


def test_large_parquet_rows_are_read_a_few_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorafit.data.sources.parquet.BATCH_BYTES", 100_000)
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([{"a": "x" * 30_000 + str(number)} for number in range(9)]), sink)
    path = made.write(tmp_path / "a.parquet", sink.getvalue())
    read_rows: list[int] = []
    original = pq.ParquetFile.iter_batches

    def counted(self: pq.ParquetFile, batch_size: int) -> Any:
        read_rows.append(batch_size)
        return original(self, batch_size=batch_size)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", counted)
    rows = read(path)
    assert read_rows[0] <= 3
    assert len(rows) == 9
    assert all(row.size_bytes >= 30_000 for row in rows)


@pytest.mark.parametrize(("cut", "kept", "rejected"), [(20, 39, 1), (1, 40, 1), (0, 40, 0)])
def test_a_truncated_array_counts_each_element_once(tmp_path: Path, cut: int, kept: int, rejected: int) -> None:
    """Cut inside the last element, that one is rejected; cut right before the `]`, the missing end is."""
    import json

    from lorafit.config import resolve
    from lorafit.data import prepare

    rows = [{"instruction": f"say {n}", "response": f"ok {n}"} for n in range(40)]
    text = json.dumps(rows)
    path = tmp_path / "rows.json"
    path.write_text(text[: len(text) - cut])
    summary = prepare(resolve(flags={"data": str(path)}).config, None).summary
    assert (summary.kept, summary.rejected) == (kept, rejected)
    assert summary.read == kept + rejected
