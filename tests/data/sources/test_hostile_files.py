"""Hostile data files: time and memory stay bounded, and what is said is one sentence."""

import gc
import gzip
import io
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

import made_data as made
from lorafit.config import one_line, resolve
from lorafit.data.sources.discovery import find_files
from lorafit.data.sources.files import BLOCK_BYTES, LINE_LIMIT_BYTES, ZstdStream, lines
from lorafit.data.sources.raw_row import Reject, parse_row
from lorafit.data.sources.reader import RowReader
from lorafit.errors import DataError, UsageError


def twice_named(count: int) -> bytes:
    keys = ",".join(f'"k{number}":1' for number in range(count))
    return f'{{{keys},"k{count - 1}":2}}'.encode()


HOSTILE_ROWS = {
    "a field twice among many": twice_named,
    "escaped quotes in a text without an end": lambda n: b"[" * 65 + b'"' + rb"\"" * n,
    "brackets": lambda n: b"[" * n,
    "objects in objects": lambda n: b'{"a":' * n,
    "backslashes": lambda n: b'{"a": "' + b"\\" * n + b'"}',
    "commas": lambda n: b'{"a": [' + b"," * n,
    "blanks": lambda n: b'{"a": 1' + b" " * n,
    "digits": lambda n: b'{"a": ' + b"7" * n + b"}",
    "many texts": lambda n: b'{"a": [' + b'"",' * n + b'""]}',
    "half surrogates": lambda n: b'{"a": "' + rb"\ud800" * n + b'"}',
    "bytes that are no UTF-8": lambda n: b'{"a": "' + b"\xff" * n,
}


@pytest.mark.parametrize("kind", HOSTILE_ROWS)
def test_a_row_takes_time_in_step_with_its_size(kind: str) -> None:
    """Sixteen times the row may take thirty times the time, and 50 ms more: of what is quadratic it is 256 times."""

    def seconds(count: int) -> float:
        raw = HOSTILE_ROWS[kind](count)
        gc.disable()  # the collector would look through all that the tests before have left
        started = time.process_time()
        parse_row(raw)
        ended = time.process_time()
        gc.enable()
        return ended - started

    small = min(seconds(4_000) for _ in range(3))
    large = min(seconds(64_000) for _ in range(3))  # one measurement has met a busy neighbour
    assert large < 30 * small + 0.05


def test_a_field_that_stands_twice_is_named() -> None:
    found = parse_row(twice_named(50_000))
    assert isinstance(found, Reject)
    assert (found.code, found.reason) == ("D003", "the field 'k49999' stands twice")


class Dripping:
    """A stream that gives a few bytes at a time, whatever is asked for."""

    def __init__(self, content: bytes, step: int) -> None:
        self.content, self.step, self.at = content, step, 0

    def read(self, size: int) -> bytes:
        """At most `step` bytes."""
        self.at += self.step
        return self.content[self.at - self.step : self.at]


@pytest.mark.parametrize("step", [1, 2, 7, 1000])
def test_lines_are_the_same_however_the_stream_is_cut(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorafit.data.sources.files.LINE_LIMIT_BYTES", 10)
    content = b"a\n\n" + b"x" * 9 + b"\n" + b"y" * 10 + b"\n" + b"z" * 35 + b"\n\nend"
    expected = [(n, line[:10], len(line)) for n, line in enumerate(content.split(b"\n"), 1)]
    assert list(lines(Dripping(content, step))) == expected


def test_a_long_line_in_small_pieces_takes_time_in_step_with_its_length() -> None:
    started = time.process_time()
    ((number, raw, length),) = lines(Dripping(b"x" * (24 << 20), 1 << 12))
    assert (number, len(raw), length) == (1, LINE_LIMIT_BYTES, 24 << 20)
    assert time.process_time() - started < 2


def rle_bomb(blocks: int) -> bytes:
    """A zstd frame of `blocks` blocks, each four bytes that stand for 128 KiB of one repeated byte."""
    header = bytes.fromhex("28b52ffd") + b"\x00\x58"
    size = 128 << 10
    block = ((size << 3) | 2).to_bytes(3, "little") + b"x"
    return header + block * (blocks - 1) + ((size << 3) | 3).to_bytes(3, "little") + b"x"


LIMITED = """
import resource, sys
from lorafit.config import resolve
from lorafit.data.sources.discovery import find_files
from lorafit.data.sources.reader import RowReader
from lorafit.errors import LorafitError
import pyarrow.parquet
resource.setrlimit(resource.RLIMIT_CPU, (20, 20))
seen, start = 0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    for row in RowReader(find_files(sys.argv[1:2]), int(sys.argv[2])):
        seen += 1
except LorafitError as error:
    print(error.sentence)
print(seen, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start) >> 10)
"""


def read_limited(path: Path, max_unpacked: int) -> tuple[list[str], int, int]:
    """(what was said, rows read, MiB of memory taken) in a process of its own with 20 s of processor time."""
    command = [sys.executable, "-c", LIMITED, str(path), str(max_unpacked)]
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout.splitlines()
    seen, memory = map(int, said.pop().split())
    return said, seen, memory


def test_a_zstd_bomb_is_read_in_bounded_time_and_memory(tmp_path: Path) -> None:
    path = made.write(tmp_path / "a.jsonl.zst", rle_bomb(4096))
    said, seen, memory = read_limited(path, 64 << 30)
    assert (said, seen) == ([], 1)  # one line of 512 MiB
    assert memory < 160


@pytest.mark.parametrize("pack", ["gz", "zst"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet"])
def test_what_a_packed_file_unpacks_to_is_capped(tmp_path: Path, name: str, pack: str) -> None:
    content = b"[" + b" " * (9 << 20)
    packed = gzip.compress(content) if pack == "gz" else zstandard.compress(content)
    path = made.write(tmp_path / f"{name}.{pack}", packed)
    with pytest.raises(
        DataError, match=r"unpacks to more than 0.007812 GiB \(max_unpacked\); .*--set max_unpacked=1TiB"
    ):
        list(RowReader(find_files([str(path)]), 8 << 20))


def test_the_cap_is_a_setting_and_its_fix_works(tmp_path: Path) -> None:
    path = made.write(tmp_path / "a.jsonl.gz", gzip.compress(made.jsonl([made.row(n) for n in range(9_000)])))
    with pytest.raises(DataError, match="max_unpacked"):
        made.prepared(path, max_unpacked="1MiB")
    assert made.prepared(path, max_unpacked="1TiB").summary.kept == 9_000


def test_a_cap_that_is_no_size_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="max_unpacked"):
        resolve({}, {"max_unpacked": "much"})


def test_a_plain_file_has_no_cap(tmp_path: Path) -> None:
    path = made.write(tmp_path / "a.jsonl", [made.row(n) for n in range(10)])
    assert len(list(RowReader(find_files([str(path)]), 8))) == 10


def dictionary_bomb(rows: int, value: str) -> bytes:
    """A Parquet file of a kilobyte in which one text stands in each of `rows` rows."""
    repeated = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array([value]))
    messages = pa.ListArray.from_arrays(
        pa.array(range(rows + 1), pa.int32()),
        pa.StructArray.from_arrays([pa.array(["user"] * rows), repeated], ["role", "content"]),
    )
    sink = io.BytesIO()
    table = pa.table({"instruction": repeated, "messages": messages})
    pq.write_table(table, sink, compression="zstd", store_schema=False)
    return sink.getvalue()


def test_a_parquet_dictionary_bomb_is_read_in_bounded_memory_and_capped(tmp_path: Path) -> None:
    path = made.write(tmp_path / "a.parquet", dictionary_bomb(50_000, "x" * (4 << 20)))
    assert path.stat().st_size < 10_000
    said, seen, memory = read_limited(path, 1 << 30)
    assert len(said) == 1 and "max_unpacked" in said[0]
    assert 100 < seen <= 129
    assert memory < 160


def test_texts_of_a_dictionary_are_read_as_any_others(tmp_path: Path) -> None:
    path = made.write(tmp_path / "a.parquet", dictionary_bomb(3, "ü"))
    rows = list(RowReader(find_files([str(path)])))
    assert [row.fields for row in rows] == [{"instruction": "ü", "messages": [{"role": "user", "content": "ü"}]}] * 3


@pytest.mark.parametrize("chunk", [1, 13, 4096])
def test_a_zstd_stream_gives_what_was_asked_for(chunk: int) -> None:
    content = bytes(range(256)) * 300
    packed = zstandard.compress(content[:1000]) + zstandard.compress(b"") + zstandard.compress(content[1000:])
    stream, parts = ZstdStream(io.BytesIO(packed)), []
    while part := stream.read(chunk):
        parts.append(part)
    assert b"".join(parts) == content
    assert {len(part) for part in parts[:-1]} == {chunk}


def test_many_empty_frames_are_read_in_step_with_their_number() -> None:
    started = time.process_time()
    assert ZstdStream(io.BytesIO(zstandard.compress(b"") * 20_000)).read(BLOCK_BYTES) == b""
    assert time.process_time() - started < 5


@pytest.mark.parametrize(
    ("problem", "shown"),
    [
        ("one\ntwo\r\n three", "one two three"),
        (OSError(5, "Input/output error"), "Input/output error"),
        (OSError("no\nnumber"), "no number"),
        (ValueError(), "ValueError"),
        ("a\x1b[31mb\x00", "a�[31mb�"),
        ("x" * 300, "x" * 199 + "…"),
    ],
)
def test_foreign_words_are_one_printable_line(problem: Any, shown: str) -> None:
    assert one_line(problem) == shown


def test_a_parquet_error_of_two_lines_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise OSError("Couldn't deserialize thrift:\nTProtocolException: Invalid data")

    monkeypatch.setattr(pq, "read_metadata", broken)
    with pytest.raises(DataError) as seen:
        list(RowReader(find_files([str(made.write(tmp_path / "a.parquet", b"PAR1"))])))
    assert "\n" not in seen.value.sentence
    assert "Invalid data" in seen.value.sentence


def test_unreadable_files_under_a_glob_are_our_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl").write_bytes(made.jsonl([made.row(1)]))
    original = Path.stat

    def refused(self: Path, **kwargs: Any) -> Any:
        if self.name == "a.jsonl":
            raise PermissionError(13, "Permission denied")
        return original(self, **kwargs)

    monkeypatch.setattr(Path, "stat", refused)
    with pytest.raises(DataError, match="Permission denied"):
        find_files([str(tmp_path / "*.jsonl")])


LONG_ROW = """
import resource, sys
from pathlib import Path
from lorafit.config import resolve
from lorafit.data import prepare
start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
path = Path(sys.argv[1])
config = resolve({}, {"data": str(path), "holdout": 0, "on_bad": "drop"}).config
result = prepare(config, None, cache_dir=path.parent / "cache")
told = [finding.code for finding in result.findings]
print(len(result.train), *told, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start) >> 10)
"""


@pytest.mark.parametrize(("suffix", "most_mib"), [(".jsonl", 96), (".csv", 224)])
def test_a_row_of_24_mib_is_told_in_bounded_memory(tmp_path: Path, suffix: str, most_mib: int) -> None:
    text = "word and more " * ((24 << 20) // 14)
    rows = [{"prompt": "a", "completion": text}, {"prompt": "c", "completion": "d"}]
    content = made.jsonl(rows) if suffix == ".jsonl" else f"prompt,completion\na,{text}\nc,d\n".encode()
    command = [sys.executable, "-c", LONG_ROW, str(made.write(tmp_path / f"a{suffix}", content))]
    kept, *told, memory = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.split()
    assert kept == "1" and {"D006", "D053"} & set(told) and int(memory) < most_mib
