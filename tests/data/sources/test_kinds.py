"""Files that are not what their names say: one sentence with the way on, or read right."""

import bz2
import contextlib
import gzip
import io
import json
import lzma
import pickle
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

import made_data as made
from lorafit.config import resolve
from lorafit.data import fix_rows
from lorafit.errors import DataError

ROWS = [{"prompt": f"ask {n}", "completion": f"say {n}"} for n in range(3)]
LINES = made.jsonl(ROWS)
TABLE = b"prompt,completion\n" + b"".join(b"ask %d,say %d\n" % (n, n) for n in range(3))
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
PAGE = b"<!DOCTYPE html>\n<html><head><title>404</title></head></html>\n"
DRAWN = {
    "Markdown": b"| prompt | completion |\n|---|:---:|\n| ask 0 | say 0 |\n|ask 1|say 1|\n| ask 2 | say 2 |\n",
    "Markdown without edges": b"prompt | completion\n--- | ---\nask 0 | say 0\nask 1 | say 1\nask 2|say 2\n",
    "psql": b" prompt | completion \n--------+----\n ask 0 | say 0\n ask 1 | say 1\n ask 2 | say 2\n(3 rows)\n",
    "MySQL": b"+---+---+\n| prompt | completion |\n+---+---+\n|ask 0|say 0|\n|ask 1|say 1|\n|ask 2|say 2|\n+---+---+\n",
}


def packed_table() -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(ROWS), out)
    return out.getvalue()


def archive(kind: str) -> bytes:
    out = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(out, "w") as packed:
            packed.writestr("inside.jsonl", LINES)
    else:
        with tarfile.open(fileobj=out, mode="w") as packed:
            entry = tarfile.TarInfo("inside.jsonl")
            entry.size = len(LINES)
            packed.addfile(entry, io.BytesIO(LINES))
    return out.getvalue()


def read(path: Path) -> list[str]:
    rows = made.prepared(path, holdout=0.0).train
    return [rows.record(place).response for place in range(len(rows))]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet", "a.arrow", "a.jsonl.gz", "a.csv.zst"])
@pytest.mark.parametrize(
    ("content", "says"),
    [
        (POINTER, "pointer of git-LFS.*run `git lfs pull`"),
        (PAGE, "is a web page.*download the file again"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "is XML"),
        (b"Entry not found", "a server's message"),
        (b"404: Not Found\n", "a server's message"),
        (b"%PDF-1.4 and so on", "is a PDF"),
        (pickle.dumps(ROWS), "is a Python pickle"),
        (b"", "the file is empty"),
    ],
)
def test_what_stands_in_place_of_rows_is_one_sentence(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    with pytest.raises(DataError, match=says):
        made.prepared(made.write(tmp_path / name, content))
    if name.endswith(".gz") and content:
        with pytest.raises(DataError, match=says.replace("is a P", "holds a P")):
            made.prepared(made.write(tmp_path / name, gzip.compress(content)))


MOVED: dict[str, tuple[str, bytes]] = {
    "gzip": ("a.jsonl", gzip.compress(LINES)),
    "zstd": ("a.csv", zstandard.compress(TABLE)),
    "Parquet": ("a.jsonl", packed_table()),
    "bzip2": ("a.jsonl", bz2.compress(LINES)),
    "xz": ("a.jsonl", lzma.compress(LINES)),
    "tar": ("a.jsonl", archive("tar")),
    "zip": ("a.jsonl", archive("zip")),
    "JSON lines as CSV": ("a.csv", LINES),
    "CSV as JSON lines": ("a.jsonl", TABLE),
    "CSV as JSON": ("a.json", TABLE),
    "JSON as Parquet": ("a.parquet", LINES),
    "no gzip": ("a.jsonl.gz", LINES),
    "CSV in gzip": ("a.jsonl.gz", gzip.compress(TABLE)),
    "rows over several lines": ("a.jsonl", b"\n".join(json.dumps(row, indent=1).encode() for row in ROWS)),
}
COMMAND = re.compile(r"python -c .*|mv '[^']*' '[^']*'|(?:bunzip2|unxz) '[^']*'|python -m \w+ -e '[^']*' \.")


@pytest.mark.parametrize("case", MOVED)
def test_the_way_on_works_as_printed(tmp_path: Path, case: str) -> None:
    name, content = MOVED[case]
    if case in ("bzip2", "xz") and not shutil.which({"bzip2": "bunzip2", "xz": "unxz"}[case]):
        pytest.skip("its program is not here")
    path = made.write(tmp_path / name, content)
    with pytest.raises(DataError) as caught:
        made.prepared(path)
    fix = str(caught.value.fix)
    for command in COMMAND.findall(fix):
        line = re.sub("^python", shlex.quote(sys.executable), command.strip("()"))
        subprocess.run(line, shell=True, check=True, cwd=tmp_path)
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    left = [one for one in tmp_path.iterdir() if one != path] or [path]
    found = next(
        one for one in sorted(left, key=lambda one: one.name != "rows.jsonl") if one.suffix not in (".bz2", ".xz")
    )
    assert read(found) == ["say 0", "say 1", "say 2"]


@pytest.mark.parametrize("case", DRAWN)
def test_a_table_drawn_with_lines_is_read_without_them(tmp_path: Path, case: str) -> None:
    path = made.write(tmp_path / "a.csv", DRAWN[case])
    assert read(path) == ["say 0", "say 1", "say 2"]
    assert "table drawn with lines" in made.found(made.prepared(path, holdout=0.0), "D009").message


def test_a_drawn_table_is_written_clean(tmp_path: Path) -> None:
    path = made.write(tmp_path / "a.csv", DRAWN["Markdown"])
    fix_rows(resolve({}, {"data": str(path)}).config, tmp_path / "clean.jsonl")
    assert read(tmp_path / "clean.jsonl") == ["say 0", "say 1", "say 2"]
    assert "D009" not in made.codes(made.prepared(tmp_path / "clean.jsonl", holdout=0.0))


READ = {
    "a list as lines": ("a.jsonl", json.dumps(ROWS).encode()),
    "a list over several lines": ("a.jsonl", json.dumps(ROWS, indent=1).encode()),
    "lines as a list": ("a.json", LINES),
    "tabs as CSV": ("a.csv", TABLE.replace(b",", b"\t")),
    "commas as TSV": ("a.tsv", TABLE),
    "dashes as an answer": ("a.csv", TABLE),
}


@pytest.mark.parametrize("case", READ)
def test_a_file_under_a_kindred_name_is_read(tmp_path: Path, case: str) -> None:
    name, content = READ[case]
    assert read(made.write(tmp_path / name, content)) == ["say 0", "say 1", "say 2"]


def test_rows_that_only_look_like_another_kind_are_read(tmp_path: Path) -> None:
    assert read(made.write(tmp_path / "a.csv", b'prompt,completion\nask,"---|---"\n')) == ["---|---"]
    assert read(made.write(tmp_path / "b.csv", b"prompt|completion\nask|--\n")) == ["--"]
    assert read(made.write(tmp_path / "c.jsonl", [{"prompt": "<html>", "completion": "Not Found"}])) == ["Not Found"]
    with contextlib.suppress(DataError):
        made.prepared(made.write(tmp_path / "d.jsonl", b'{"error": "x"}\n'))
        raise AssertionError("a server's message is no row")
