"""Data files made for the tests, and `prepare` over them with a cache of their own."""

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from lorafit.config import resolve
from lorafit.data import Prepared, Template, prepare
from lorafit.findings import Finding


def row(number: int, **fields: Any) -> dict[str, Any]:
    """A plain row that resembles no other: every word depends on `number`."""
    words = [f"w{number}x{place}" for place in range(12)]
    plain = {"instruction": " ".join(words[:5]), "input": " ".join(words[5:8]), "response": " ".join(words[8:])}
    return {**plain, **fields}


def jsonl(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """The rows, one a line."""
    return b"".join(json.dumps(fields, ensure_ascii=False).encode() + b"\n" for fields in rows)


def write(path: Path, content: bytes | Sequence[Mapping[str, Any]]) -> Path:
    """A file with these bytes, or these rows as JSONL."""
    path.write_bytes(content if isinstance(content, bytes) else jsonl(content))
    return path


def prepared(path: Path, template: Template | None = None, run_dir: Path | None = None, **settings: Any) -> Prepared:
    """`prepare` of one file, with a cache beside it."""
    config = resolve({}, {"data": str(path), **settings}).config
    return prepare(config, template, run_dir=run_dir, cache_dir=path.parent / "cache")


def found(result: Prepared, code: str) -> Finding:
    """The one finding of this code."""
    matching = [finding for finding in result.findings if finding.code == code]
    assert len(matching) == 1, f"{code} among {[finding.code for finding in result.findings]}"
    return matching[0]


def codes(result: Prepared) -> set[str]:
    """The codes of all findings."""
    return {finding.code for finding in result.findings}


def spoken(path: Path, **settings: Any) -> list[list[tuple[str, str]]]:
    """Role and content of every turn of every row."""
    rows = prepared(path, holdout=0.0, ignore=["D037"], **settings).train
    return [[(turn.role, turn.content) for turn in rows.record(place).turns] for place in range(len(rows))]


def run_fix(fix: str, folder: Path) -> dict[str, str]:
    """Run the command in a fix; the `--map` pairs that it names."""
    command = re.sub(
        r"\bpython -c", f"{shlex.quote(sys.executable)} -c", fix[re.search("python -c|grep", fix).start() :]
    )  # type: ignore[union-attr]
    command, _, then = command.partition(" && lorafit ")
    subprocess.run(command, shell=True, check=True, cwd=folder)
    return dict(word.split("=", 1) for flag, word in pairwise(shlex.split(then)) if flag == "--map")
