"""RowStore, StoreWriter and Rows: tokenised rows in memory or memory-mapped, written chunk by chunk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lorafit.data.schema.records import Record, Turn

if TYPE_CHECKING:
    from lorafit.data.template.template import Encoded

NAMES = "names.json"
SUPERVISED = np.int32(np.iinfo(np.int32).min)
"""The sign bit of a stored token says 'supervised': ids and mask travel in one int32."""


def flagged(ids: NDArray[np.int32], mask: NDArray[np.bool_]) -> NDArray[np.int32]:
    """Return `ids` (tokens,) with `mask` (tokens,) in the sign bit, as stored."""
    return np.where(mask, ids | SUPERVISED, ids).astype(np.int32)


@dataclass(frozen=True)
class RowStore:
    """Columns of n rows. Token i of row r is `tokens[offsets[r] + i]`, its sign bit the loss mask.

    `tokens` (all tokens,) int32; `offsets` (n + 1,) int64; `supervised` (n,) int32; `file` (n,) int32 into
    `names`; `line` (n,) int64; `text` (bytes,) uint8 with each record's JSON at `text_offsets` (n + 1,) int64.
    `pending` are checks that have to pass before tokens or texts are read.
    """

    tokens: NDArray[np.int32]
    offsets: NDArray[np.int64]
    supervised: NDArray[np.int32]
    file: NDArray[np.int32]
    line: NDArray[np.int64]
    names: tuple[str, ...]
    text: NDArray[np.uint8]
    text_offsets: NDArray[np.int64]
    folder: Path | None = None
    pending: list[Callable[[], None]] = field(default_factory=list)

    def settle(self) -> None:
        """Run the pending checks, and raise their errors."""
        for check in self.pending:
            check()
        self.pending.clear()

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @classmethod
    def open(cls, folder: Path) -> RowStore:
        """Return the store that StoreWriter wrote into `folder`, its tokens and text memory-mapped.

        Raises OSError, KeyError or ValueError when a file is missing or damaged.
        """
        column = {
            name: np.load(folder / f"{name}.npy") for name in ("length", "supervised", "file", "line", "text_length")
        }
        store = cls(
            tokens=mapped(folder / "tokens.bin", np.int32),
            offsets=offsets_of(column["length"]),
            supervised=column["supervised"],
            file=column["file"],
            line=column["line"],
            names=tuple(json.loads((folder / NAMES).read_text(encoding="utf-8"))),
            text=mapped(folder / "text.bin", np.uint8),
            text_offsets=offsets_of(column["text_length"]),
            folder=folder,
        )
        if len(store.tokens) != store.offsets[-1] or len(store.text) != store.text_offsets[-1]:
            raise ValueError(f"the store in {folder} is damaged")
        return store

    def __reduce__(self) -> tuple[Any, ...]:
        # to another process a store on disk travels as its path: pickle would copy what is memory-mapped
        if self.folder is not None:
            return RowStore.open, (self.folder,)
        return RowStore, tuple(getattr(self, field.name) for field in fields(self))


def offsets_of(lengths: Sequence[int] | NDArray[np.integer[Any]]) -> NDArray[np.int64]:
    """Return (n + 1,): the starts of rows of these lengths, and the end."""
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(np.asarray(lengths, dtype=np.int64), out=offsets[1:])
    return offsets


def mapped(path: Path, kind: type[np.generic]) -> NDArray[Any]:
    """Return the values of `kind` in the file at `path`, memory-mapped."""
    return np.memmap(path, kind, mode="r") if path.stat().st_size else np.zeros(0, kind)


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
    """Write rows into `folder`. Only the per-row columns stay in memory until `close`."""

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
        """Append rows: tokens and word hashes row after row, records as JSON, and one value per column."""
        self.tokens.write(np.ascontiguousarray(tokens).data)
        self.words.write(np.ascontiguousarray(words).data)
        self.text.writelines(texts)
        self.parts["text_length"].append(np.array([len(text) for text in texts], np.int32))
        for name, values in columns.items():
            self.parts[name].append(np.array(values, COLUMNS[name]))

    def columns(self) -> dict[str, NDArray[Any]]:
        """Return every whole column, by name."""
        parts = {name: self.parts[name] or [np.zeros(0, kind)] for name, kind in COLUMNS.items()}
        return {name: np.concatenate(parts[name]) for name in COLUMNS}

    def flush(self) -> None:
        """Close the files that grow row by row."""
        for stream in (self.tokens, self.text, self.words, self.rejected):
            stream.close()

    def finish(self, columns: Mapping[str, NDArray[Any]], facts: Mapping[str, Any]) -> None:
        """Write the columns and `facts` (JSON-ready). The folder is complete afterwards."""
        for name, values in columns.items():
            np.save(self.folder / f"{name}.npy", values)
        (self.folder / "words.bin").unlink()
        (self.folder / NAMES).write_text(json.dumps(facts["names"]), encoding="utf-8")
        (self.folder / FACTS).write_text(json.dumps(facts), encoding="utf-8")


@dataclass(frozen=True)
class Stored:
    """A complete folder: its rows, the columns (n,) for checks of the whole set, and the facts.

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
        """Return the folder that `StoreWriter.finish` completed."""
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        columns = {name: np.load(folder / f"{name}.npy") for name in ("exact", "question", "answer", LEADER, "row")}
        return cls(RowStore.open(folder), **columns, facts=facts, folder=folder)


class Rows:
    """A selection of rows of a store, in order. Selecting is cheap; token data are read on demand."""

    def __init__(self, store: RowStore, indices: NDArray[np.int64] | None = None) -> None:
        self.store = store
        self.indices = np.arange(len(store), dtype=np.int64) if indices is None else indices
        self.lengths: NDArray[np.int32] = np.diff(store.offsets)[self.indices].astype(np.int32)
        self.supervised: NDArray[np.int32] = np.asarray(store.supervised)[self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def _stored(self, position: int) -> NDArray[np.int32]:
        if self.store.pending:
            self.store.settle()
        row = self.indices[position]
        return np.asarray(self.store.tokens[self.store.offsets[row] : self.store.offsets[row + 1]])

    def ids(self, position: int) -> NDArray[np.int32]:
        """Return the token ids (tokens,) of the row at `position`."""
        return self._stored(position) & ~SUPERVISED

    def mask(self, position: int) -> NDArray[np.bool_]:
        """Return the loss mask (tokens,) of the row at `position`: True for supervised tokens."""
        return self._stored(position) < 0

    def source(self, position: int) -> str:
        """Return `file:line` of the row at `position`."""
        row = self.indices[position]
        return f"{self.store.names[self.store.file[row]]}:{self.store.line[row]}"

    def record(self, position: int) -> Record:
        """Return the record that the row at `position` was tokenised from."""
        self.store.settle()
        row = self.indices[position]
        raw = self.store.text[self.store.text_offsets[row] : self.store.text_offsets[row + 1]]
        assert len(raw), "these rows were made without their records"
        return record_from_json(raw.tobytes(), self.source(position))

    def select(self, indices: Sequence[int] | NDArray[np.integer[Any]]) -> Rows:
        """Return the rows at these positions, in this order."""
        return Rows(self.store, self.indices[np.asarray(indices, dtype=np.int64)])

    @property
    def content_hash(self) -> str:
        """Return the SHA-256 over ids and masks in order, in hex."""
        self.store.settle()
        digest = hashlib.sha256(self.lengths.astype("<i4").tobytes())
        # rows that follow one another in the store are hashed in one piece
        for run in np.split(self.indices, np.flatnonzero(np.diff(self.indices) != 1) + 1):
            if len(run):
                tokens = self.store.tokens[self.store.offsets[run[0]] : self.store.offsets[run[-1] + 1]]
                digest.update(np.asarray(tokens, "<i4").tobytes())
        return digest.hexdigest()

    def sources(self) -> Iterator[str]:
        """Yield `file:line` of every row, in order."""
        files, lines = self.store.file[self.indices].tolist(), self.store.line[self.indices].tolist()
        return (f"{self.store.names[file]}:{line}" for file, line in zip(files, lines, strict=True))

    @classmethod
    def from_encoded(cls, encoded: Sequence[Encoded], records: Sequence[Record] | None = None) -> Rows:
        """Return rows held in memory, for data without a file."""
        assert records is None or len(records) == len(encoded), "as many records as encoded rows"
        lengths = [len(one.ids) for one in encoded]
        ids = np.fromiter((i for one in encoded for i in one.ids), np.int32, sum(lengths))
        mask = np.fromiter((m for one in encoded for m in one.mask), np.bool_, sum(lengths))
        texts = [record_to_json(record) for record in records] if records else [b""] * len(encoded)
        sources = (
            [_split_source(record.source) for record in records]
            if records
            else [("row", n + 1) for n in range(len(encoded))]
        )
        names = tuple(dict.fromkeys(name for name, _ in sources))
        place = {name: number for number, name in enumerate(names)}
        store = RowStore(
            tokens=flagged(ids, mask),
            offsets=offsets_of(lengths),
            supervised=np.array([sum(one.mask) for one in encoded], np.int32),
            file=np.array([place[name] for name, _ in sources], np.int32),
            line=np.array([line for _, line in sources], np.int64),
            names=names,
            text=np.frombuffer(b"".join(texts), np.uint8),
            text_offsets=offsets_of([len(text) for text in texts]),
        )
        return cls(store)


def _split_source(source: str) -> tuple[str, int]:
    name, _, line = source.rpartition(":")
    return (name, int(line)) if name and line.isdigit() else (source, 0)


_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), default=str).encode
_encode_ascii = json.JSONEncoder(separators=(",", ":"), default=str).encode


def record_to_json(record: Record) -> bytes:
    """Return the record, without its source, as one line of UTF-8. `record_from_json` is the inverse."""
    turns = [_turn_to_json(turn) for turn in record.turns]
    read_by_template = [record.tools, record.template_kwargs] if record.template_kwargs else [record.tools]
    plain = [record.system, turns, *(read_by_template if any(read_by_template) else ())]
    # what only a template reads may hold anything, half surrogates too: those must survive as escapes
    encode = _encode if not (any(read_by_template) or any(turn.extra for turn in record.turns)) else _encode_ascii
    return encode(plain).encode()


def _turn_to_json(turn: Turn) -> list[Any]:
    if turn.loss is not None:
        return [turn.role, turn.content, turn.extra, turn.loss]
    return [turn.role, turn.content, turn.extra] if turn.extra else [turn.role, turn.content]


def record_from_json(raw: bytes, source: str) -> Record:
    """Return the record that `record_to_json` wrote."""
    system, turns, *more = json.loads(raw)
    tools, kwargs = more[0] if more else (), more[1] if len(more) > 1 else {}
    return Record(tuple(Turn(*turn) for turn in turns), source, system, tuple(tools), kwargs)
