"""StoreWriter: grows a RowStore on disk, chunk by chunk, and opens it memory-mapped."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from lorafit.data.row_store import NAMES, RowStore

FACTS, LEADER = "facts.json", "leader"
COLUMNS = {
    "length": np.int32,
    "supervised": np.int32,
    "file": np.int32,
    "line": np.int64,
    "row": np.int64,
    "text_length": np.int32,
    "words": np.int32,
    "exact": np.uint64,
    "question": np.uint64,
    "answer": np.uint64,
}
"""One value per row, by name; `row` counts the rows as they were read, so that the pieces of a split conversation
share it, and rows that stand on one line do not. `words` counts them."""


@dataclass
class StoreWriter:
    """Writes into `folder`; only the per-row columns stay in memory until `close`."""

    folder: Path
    parts: dict[str, list[NDArray[Any]]] = field(default_factory=lambda: {name: [] for name in COLUMNS})

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.tokens: IO[bytes] = (self.folder / "tokens.bin").open("wb")
        self.text: IO[bytes] = (self.folder / "text.bin").open("wb")
        self.words: IO[bytes] = (self.folder / "words.bin").open("wb")
        self.rejected: IO[bytes] = (self.folder / "rejected.jsonl").open("wb")

    def add(
        self,
        tokens: NDArray[np.int32],
        texts: Sequence[bytes],
        words: NDArray[np.uint32],
        columns: Mapping[str, Sequence[int]],
    ) -> None:
        """Append rows: tokens and word hashes one row after the other, records as JSON, and a value per column."""
        self.tokens.write(np.ascontiguousarray(tokens).data)
        self.words.write(np.ascontiguousarray(words).data)
        self.text.writelines(texts)
        self.parts["text_length"].append(np.array([len(text) for text in texts], np.int32))
        for name, values in columns.items():
            self.parts[name].append(np.array(values, COLUMNS[name]))

    def columns(self) -> dict[str, NDArray[Any]]:
        """Every column whole, by name."""
        parts = {name: self.parts[name] or [np.zeros(0, kind)] for name, kind in COLUMNS.items()}
        return {name: np.concatenate(parts[name]) for name in COLUMNS}

    def flush(self) -> None:
        """Close the files that grow row by row."""
        for stream in (self.tokens, self.text, self.words, self.rejected):
            stream.close()

    def finish(self, columns: Mapping[str, NDArray[Any]], facts: Mapping[str, Any]) -> None:
        """Write the columns and `facts` (JSON-ready); the folder is then complete."""
        for name, values in columns.items():
            np.save(self.folder / f"{name}.npy", values)
        (self.folder / "words.bin").unlink()
        (self.folder / NAMES).write_text(json.dumps(facts["names"]), encoding="utf-8")
        (self.folder / FACTS).write_text(json.dumps(facts), encoding="utf-8")


@dataclass(frozen=True)
class Stored:
    """A complete folder: its rows, the columns (n,) that judgements of the whole set need, and the facts.

    `leader` is each row's first near copy (itself, when it has none); `exact`, `question`, `answer` are hashes; `row`
    is the row as it was read.
    """

    rows: RowStore
    exact: NDArray[np.uint64]
    question: NDArray[np.uint64]
    answer: NDArray[np.uint64]
    leader: NDArray[np.int64]
    row: NDArray[np.int64]
    facts: dict[str, Any]
    folder: Path

    @classmethod
    def open(cls, folder: Path) -> Stored:
        """The folder that `StoreWriter.finish` completed."""
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        columns = {name: np.load(folder / f"{name}.npy") for name in ("exact", "question", "answer", LEADER, "row")}
        return cls(RowStore.open(folder), **columns, facts=facts, folder=folder)
