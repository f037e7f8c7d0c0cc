"""Data files made for the tests, and `prepare` over them with a cache of their own."""

import json
from collections.abc import Mapping, Sequence
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
