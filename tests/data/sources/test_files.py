"""Sources: what a path, a glob, a folder or a hub id stands for, and one sentence when it stands for nothing."""

import io
import os
import random
from pathlib import Path

import pytest
import zstandard

from lorafit.data.sources.discovery import find_files
from lorafit.data.sources.files import ByteStream, ZstdStream, reading
from lorafit.errors import DataError

BEGINS = {".gz": b"\x1f\x8b\x08", ".zst": b"\x28\xb5\x2f\xfd", ".parquet": b"PAR1"}
"""How files of these names begin; nothing more of them is read here."""
ONE_ROW = b'{"instruction": "a", "response": "b"}\n'


def put(path: Path, content: bytes = ONE_ROW) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(BEGINS.get(path.suffix, b"") + content)
    return path


def test_files_come_in_the_order_they_are_named_and_once(tmp_path: Path) -> None:
    one, other = put(tmp_path / "b.jsonl"), put(tmp_path / "a.csv")
    assert [file.path for file in find_files([str(one), str(other), str(one)])] == [one, other]


def test_a_glob_gives_its_matches_sorted(tmp_path: Path) -> None:
    for name in ("c.jsonl", "a.jsonl", "b.txt"):
        put(tmp_path / name)
    assert [file.path.name for file in find_files([str(tmp_path / "*.jsonl")])] == ["a.jsonl", "c.jsonl"]


def test_a_folder_gives_its_data_files_and_no_hidden_ones(tmp_path: Path) -> None:
    for name in ("z.jsonl", "sub/a.parquet", ".hidden.jsonl", ".git/x.json", "README.md", "sub/b.csv.gz"):
        put(tmp_path / name)
    names = [str(file.path.relative_to(tmp_path)) for file in find_files([str(tmp_path)])]
    assert names == ["sub/a.parquet", "sub/b.csv.gz", "z.jsonl"]


@pytest.mark.parametrize(
    ("name", "form", "compression"),
    [
        ("a.jsonl", "jsonl", ""),
        ("a.ndjson", "jsonl", ""),
        ("a.JSON", "json", ""),
        ("a.b.csv.gz", "csv", "gz"),
        ("a.tsv", "csv", ""),
        ("a.parquet.zst", "parquet", "zst"),
    ],
)
def test_a_name_tells_the_format(tmp_path: Path, name: str, form: str, compression: str) -> None:
    file = find_files([str(put(tmp_path / name))])[0]
    assert (file.format, file.compression) == (form, compression)


def test_a_name_of_a_hub_dataset_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_files(["someone/some-data"])[0].hub_id == "someone/some-data"


@pytest.mark.parametrize(
    ("named", "what"),
    [
        ((), "no data was named"),
        (("missing.jsonl",), "no such file"),
        (("folder/missing.jsonl",), "no such file"),
        (("",), "no such file"),
        (("a\0b.jsonl",), "no such file"),
        (("*.nothing",), "no file matches the pattern"),
        (("notes.txt",), "is a text file"),
        (("empty.jsonl",), "the file is empty"),
        (("bare",), "the folder holds no data file"),
        (("pipe.jsonl",), "is not a regular file"),
    ],
)
def test_what_is_not_there_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: tuple[str, ...], what: str
) -> None:
    monkeypatch.chdir(tmp_path)
    put(tmp_path / "notes.txt")
    put(tmp_path / "empty.jsonl", b"")
    (tmp_path / "bare").mkdir()
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(DataError) as caught:
        find_files(named)
    assert caught.value.what == what
    assert "\n" not in caught.value.sentence
    assert caught.value.fix


@pytest.mark.parametrize(("name", "content"), [("a.jsonl.gz", b"\x1f\x8b\x08no"), ("a.jsonl.zst", b"nothing like it")])
def test_a_damaged_archive_is_one_sentence(tmp_path: Path, name: str, content: bytes) -> None:
    file = find_files([str(put(tmp_path / name, content))])[0]
    with pytest.raises(DataError, match="damaged or cut off"), reading(file):
        ByteStream(file).read(1 << 16)


ROWS = b"".join(b'{"n": %d}\n' % random.Random(0).randrange(10**9) for _ in range(1)) + bytes(
    random.Random(1).choices(b"abcdefgh\n", k=400_000)
)


def read_all(packed: bytes, size: int = 5000) -> bytes:
    stream = ZstdStream(io.BytesIO(packed))
    return b"".join(iter(lambda: stream.read(size), b""))


@pytest.mark.parametrize("parts", [1, 3])
def test_frames_come_back_as_they_were_packed(parts: int) -> None:
    step = -(-len(ROWS) // parts)
    packed = b"".join(zstandard.compress(ROWS[i : i + step]) for i in range(0, len(ROWS), step))
    assert read_all(packed) == ROWS


@pytest.mark.parametrize("share", [0.01, 0.5, 0.9, 0.999])
def test_a_cut_stream_is_an_error_wherever_it_was_cut(share: float) -> None:
    packed = zstandard.compress(ROWS)
    with pytest.raises(EOFError, match="never ends"):
        read_all(packed[: int(len(packed) * share)])


def test_a_stream_cut_between_blocks_is_an_error() -> None:
    packer = zstandard.ZstdCompressor().compressobj()
    head = packer.compress(ROWS) + packer.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
    with pytest.raises(EOFError):
        read_all(head)


def test_nothing_is_nothing() -> None:
    assert read_all(b"") == b""
    assert read_all(zstandard.compress(b"")) == b""
