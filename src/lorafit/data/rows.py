"""Rows: tokenised examples, in memory or memory-mapped, by position."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lorafit.data.records import Record, Turn
from lorafit.data.row_store import SUPERVISED, RowStore, flagged, offsets_of

if TYPE_CHECKING:
    from lorafit.data.template import Encoded


class Rows:
    """A choice of rows out of a store, in order. Cheap to select from; token data are read when asked for."""

    def __init__(self, store: RowStore, indices: NDArray[np.int64] | None = None) -> None:
        self.store = store
        self.indices = np.arange(len(store), dtype=np.int64) if indices is None else indices
        self.lengths: NDArray[np.int32] = np.diff(store.offsets)[self.indices].astype(np.int32)
        self.supervised: NDArray[np.int32] = np.asarray(store.supervised)[self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def _stored(self, position: int) -> NDArray[np.int32]:
        row = self.indices[position]
        return np.asarray(self.store.tokens[self.store.offsets[row] : self.store.offsets[row + 1]])

    def ids(self, position: int) -> NDArray[np.int32]:
        """Token ids (tokens,) of the row at `position`."""
        return self._stored(position) & ~SUPERVISED

    def mask(self, position: int) -> NDArray[np.bool_]:
        """True (tokens,) where the token is supervised."""
        return self._stored(position) < 0

    def source(self, position: int) -> str:
        """`file:line` of the row at `position`."""
        row = self.indices[position]
        return f"{self.store.names[self.store.file[row]]}:{self.store.line[row]}"

    def record(self, position: int) -> Record:
        """The record that the row at `position` was tokenised from."""
        row = self.indices[position]
        raw = self.store.text[self.store.text_offsets[row] : self.store.text_offsets[row + 1]]
        assert len(raw), "these rows were made without their records"
        return record_from_json(raw.tobytes(), self.source(position))

    def select(self, indices: Sequence[int] | NDArray[np.integer[Any]]) -> Rows:
        """The rows at these positions, in this order."""
        return Rows(self.store, self.indices[np.asarray(indices, dtype=np.int64)])

    @property
    def content_hash(self) -> str:
        """SHA-256 over ids and masks in order, in hex."""
        digest = hashlib.sha256(self.lengths.astype("<i4").tobytes())
        # rows that follow one another in the store are hashed in one piece
        for run in np.split(self.indices, np.flatnonzero(np.diff(self.indices) != 1) + 1):
            if len(run):
                tokens = self.store.tokens[self.store.offsets[run[0]] : self.store.offsets[run[-1] + 1]]
                digest.update(np.asarray(tokens, "<i4").tobytes())
        return digest.hexdigest()

    def sources(self) -> Iterator[str]:
        """`file:line` of every row, in order."""
        files, lines = self.store.file[self.indices].tolist(), self.store.line[self.indices].tolist()
        return (f"{self.store.names[file]}:{line}" for file, line in zip(files, lines, strict=True))

    @classmethod
    def from_encoded(cls, encoded: Sequence[Encoded], records: Sequence[Record] | None = None) -> Rows:
        """Rows held in memory, for data that never was a file."""
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
    """The record without its source as one line of UTF-8; `record_from_json` is the inverse."""
    turns = [
        [turn.role, turn.content, turn.extra] if turn.extra else [turn.role, turn.content] for turn in record.turns
    ]
    plain = [record.system, turns, record.tools] if record.tools else [record.system, turns]
    # what only a template reads may hold anything, half surrogates too: those must survive as escapes
    encode = _encode if not (record.tools or any(turn.extra for turn in record.turns)) else _encode_ascii
    return encode(plain).encode()


def record_from_json(raw: bytes, source: str) -> Record:
    """The record that `record_to_json` wrote."""
    system, turns, *tools = json.loads(raw)
    return Record(tuple(Turn(*turn) for turn in turns), source, system, tuple(tools[0]) if tools else ())
