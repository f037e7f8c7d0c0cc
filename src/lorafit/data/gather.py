"""Gather: rows read, judged, tokenised and stored; and rows given as Python mappings."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lorafit.config import RunConfig
from lorafit.data.checks.findings import CODES, RowOutcomes
from lorafit.data.checks.rows import SAID, Observation, SpecialTokens, Tokenised, text_checks, token_checks
from lorafit.data.dedup import Compared, duplicates_of, hash64, leaders, near_copies, signatures
from lorafit.data.schema.detection import detect
from lorafit.data.schema.records import Record, each_answer_alone, split_at_turns, up_to_last_answer
from lorafit.data.schema.shapes import Shape
from lorafit.data.sources.raw_row import RawRow, Reject
from lorafit.data.sources.reader import RowReader
from lorafit.data.store import LEADER, StoreWriter, flagged, mapped, offsets_of, record_to_json
from lorafit.data.summary import Clock
from lorafit.data.template.layout import CALLS_APART
from lorafit.errors import DataError
from lorafit.findings import Severity, is_chosen

if TYPE_CHECKING:
    from lorafit.data.template.template import Template


def parse_rows(raw_rows: Iterable[Mapping[str, Any]], field_map: Mapping[str, str] | None = None) -> list[Record]:
    """Return the records of rows in any known shape. `field_map` names fields as `{"response": "answer_text"}`.

    Raises DataError for the first row that does not fit; its place is `row:N`, counted from 1.
    """
    rows = list(raw_rows)
    if not rows:
        raise DataError("there are no rows", fix="pass at least one mapping")
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, Mapping):
            raise DataError(f"is a {type(row).__name__}, not a mapping", where=f"row:{number}", fix="pass dicts")
    shape = detect(rows, field_map or {}, "rows")
    records: list[Record] = []
    for number, row in enumerate(rows, start=1):
        record = shape.record(row, f"row:{number}")
        if isinstance(record, Reject):
            raise DataError(record.reason, where=f"row:{number}", fix=record.fix or "mend or leave out the row")
        faults = (seen for code, seen in text_checks(record) if CODES[code].rejects)
        if fault := shape.lost(row, record) or next(faults, ""):
            raise DataError(fault, where=record.source, fix="mend or leave out the row")
        records.append(up_to_last_answer(record))
    return records


CHUNK_ROWS = 2048
CHUNK_BYTES = 8 << 20
CHUNKS_AHEAD = 2
IGNORABLE = ("D013", "D021", "D022", "D023", "D026", "D038", "D039", "D045")
"""Codes that reject a row unless the user ignores them: such a row can be trained on, if not well."""
Item = tuple[RawRow, Record]
Kept = tuple[RawRow, Record, Tokenised]


@dataclass(frozen=True, slots=True)
class Untokenised:
    """Stand-in for an encoded row where there is no tokenizer."""

    ids: list[int] = field(default_factory=list)
    mask: list[bool] = field(default_factory=list)
    problems: tuple[str, ...] = ()
    detail: str = ""
    lost_answers: int = 0
    lost_tokens: int = 0


class Gatherer:
    """Read every row from `reader` into `writer`, and count the outcomes."""

    def __init__(
        self, config: RunConfig, template: Template | None, reader: RowReader, writer: StoreWriter, clock: Clock
    ) -> None:
        self.config, self.template, self.reader, self.writer, self.clock = config, template, reader, writer, clock
        self.outcomes = RowOutcomes([file.name for file in reader.files], writer.rejected)
        self.special = SpecialTokens(template.tokenizer) if template else None
        self.ignored = ignored_codes(config)
        self.compares = compares(config)
        self.shape: Shape | None = None
        self.copies_s = 0.0
        self.largest_id = -1

    def run(self) -> None:
        """Read everything. One thread tokenises while this one reads and judges."""
        waiting: deque[tuple[list[Item], Future[Sequence[Tokenised]]]] = deque()
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokenise") as pool:
            for chunk in _chunks(self.reader):
                items = self._screened(chunk)
                waiting.append((items, pool.submit(self._encoded, [record for _, record in items])))
                if len(waiting) > CHUNKS_AHEAD:
                    self._store(*waiting.popleft())
                self.clock.report("reading", self.outcomes.counts.read, self.reader.bytes_done)
            while waiting:
                self._store(*waiting.popleft())
        self.clock.report("reading", self.outcomes.counts.read, self.reader.bytes_total, force=True)
        self.writer.flush()
        self._finish()

    def _finish(self) -> None:
        columns = self.writer.columns()
        started = time.monotonic()
        leader = self._leaders(columns["words"], columns["exact"])
        self.copies_s += time.monotonic() - started
        if self.template is not None:
            self.outcomes.turn_fields_seen -= self.template.turn_fields_shown(self.outcomes.turn_fields_seen)
        fields = self.outcomes.fields_seen
        facts = {
            **self.outcomes.facts(),
            "names": self.outcomes.names,
            "shape": self.shape.title if self.shape else "unknown",
            "file_warnings": {
                self.outcomes.names[file]: dict(seen) for file, seen in self.reader.file_warnings.items() if seen
            },
            "copies_s": self.copies_s,
            "unused": self.shape.unused(fields) if self.shape else [],
            "fix_of_unused": self.shape.fix_of_unused(fields, self.outcomes.names[0]) if self.shape else "",
            "largest_id": self.largest_id,
        }
        self.writer.finish({**columns, LEADER: leader}, facts)

    def _leaders(self, words: NDArray[np.int32], exact: NDArray[np.uint64]) -> NDArray[np.int64]:
        """Return (n,): for each row the first of its near copies, from word counts (n,) and exact hashes (n,)."""
        if not self.compares or not len(exact):
            return leaders(len(exact), *duplicates_of(exact))
        self.clock.report("looking for near copies", self.outcomes.counts.read, self.reader.bytes_total, force=True)
        hashes = mapped(self.writer.folder / "words.bin", np.uint32)
        signed = signatures(hashes, offsets_of(words), self.writer.folder)
        found = leaders(len(exact), *near_copies(signed))
        (self.writer.folder / "signatures.npy").unlink()
        return found

    def _screened(self, chunk: Sequence[RawRow]) -> list[Item]:
        """Return the chunk's rows that may be tokenised. The others are in the outcomes."""
        for number, row in enumerate(chunk, self.outcomes.counts.read):
            row.number = number
        self.outcomes.counts.read += len(chunk)
        if self.shape is None and (readable := [row.fields for row in chunk if row.fields is not None]):
            self.shape = detect(readable, self.config.field_map, self.outcomes.names[0])
        items: list[Item] = []
        for row in chunk:
            record = self._record(row)
            if isinstance(record, Reject):
                self.outcomes.reject(row, record)
            elif self._accepts(row, record, self._judged(row, record)):
                self.outcomes.note_fields(row, record)
                items += [(row, one) for one in self._examples(record)]
        return items

    def _examples(self, record: Record) -> list[Record]:
        """Return the parts of the record to tokenise: all of it, or each of its answers alone."""
        apart = self.template.with_calls_apart(record) if self.template else record
        if apart is not record:
            self.outcomes.note(record, [SAID[CALLS_APART]])
            record = apart
        if self.config.split_answers:
            return each_answer_alone(record)
        return [up_to_last_answer(record)]

    def _record(self, row: RawRow) -> Record | Reject:
        if row.fields is None or self.shape is None:
            assert row.reject is not None, "a row without fields says why"
            return row.reject
        return self.shape.record(row.fields, f"{self.outcomes.names[row.file]}:{row.line}")

    def _judged(self, row: RawRow, record: Record) -> list[Observation]:
        assert self.shape is not None and row.fields is not None, "a record has a shape and fields"
        seen = list(text_checks(record))
        if lost := self.shape.lost(row.fields, record):
            seen.append(("D038", lost))
        return [*seen, *self.special.text_checks(record)] if self.special else seen

    def _accepts(self, row: RawRow, record: Record, observations: Sequence[Observation]) -> bool:
        """Return True if the row may go on. Observations are in the outcomes either way."""
        for code, seen in observations:
            if CODES[code].rejects and code not in self.ignored:
                fix = self.shape.fix_of_lost(seen) if code == "D038" and self.shape else ""
                self.outcomes.reject(row, Reject(code, seen, fix=fix))
                return False
        self.outcomes.note(record, observations)
        return True

    def _encoded(self, records: Sequence[Record]) -> Sequence[Tokenised]:
        if self.template is None:
            return [Untokenised()] * len(records)
        return self.template.encode_many(records)

    def _store(self, items: Sequence[Item], encoded: Future[Sequence[Tokenised]]) -> None:
        keep: list[Kept] = []
        examples = zip(items, encoded.result(), strict=True)
        if self.config.split_answers:
            for _, group in itertools.groupby(examples, key=lambda example: example[0][0].number):
                keep += self._row_kept(list(group))
        else:
            for example in examples:
                keep += self._row_kept((example,))
        if keep:
            self._write(keep)

    def _row_kept(self, group: Sequence[tuple[Item, Tokenised]]) -> list[Kept]:
        """Return the kept examples of one row. The row counts once, as kept if one of them is."""
        counts = self.outcomes.counts
        rejected, dropped = counts.rejected, counts.dropped
        pieces = [piece for (row, record), one in group for piece in self._checked(row, record, one)]
        counts.kept += bool(pieces)
        if len(group) > 1:
            counts.split += bool(pieces)
            gone = min(1, counts.rejected - rejected) if not pieces else 0
            counts.rejected, counts.dropped = rejected + gone, dropped + (0 if pieces or gone else 1)
        for _, _, one in pieces:
            if one.lost_answers:
                self.outcomes.note_tokens(one)
        return pieces

    def _checked(self, row: RawRow, record: Record, one: Tokenised) -> list[Kept]:
        """Return the row's examples: one, several if it is split, none if it is not kept."""
        if self.template is None:
            return [(row, record, one)]
        if not self._fits(one):
            return self._too_long(row, record, one)
        return [(row, record, one)] if self._accepts(row, record, list(token_checks(one))) else []

    def _fits(self, one: Tokenised) -> bool:
        return len(one.ids) <= self.config.max_length

    def _usable(self, one: Tokenised) -> bool:
        codes = {code for code, _ in token_checks(one)} - set(self.ignored)
        return self._fits(one) and not any(CODES[code].rejects for code in codes)

    def _too_long(self, row: RawRow, record: Record, one: Tokenised) -> list[Kept]:
        answer = sum(one.mask)
        seen = f"{len(one.ids):,} tokens ({answer:,} supervised) where max_length is {self.config.max_length:,}"
        if self.config.on_long == "split-turns":
            pieces, lost = split_at_turns(record, self._encoded, self._usable)
            if pieces:
                self.outcomes.counts.split += 1
                lost_too = f"; {lost} exchanges too long by themselves left out" if lost else ""
                self.outcomes.note(record, [("D020", f"{seen}: split into {len(pieces)} examples{lost_too}")])
                return [(row, piece, tokens) for piece, tokens in pieces]
        self.outcomes.reject(row, Reject("D020", seen), dropped=self.config.on_long != "error")
        return []

    def _write(self, keep: Sequence[Kept]) -> None:
        total = sum(len(one.ids) for _, _, one in keep)
        ids = np.fromiter(itertools.chain.from_iterable(one.ids for _, _, one in keep), np.int32, total)
        self.largest_id = max(self.largest_id, int(ids.max(initial=-1)))
        mask = np.fromiter(itertools.chain.from_iterable(one.mask for _, _, one in keep), np.bool_, total)
        texts = [record_to_json(record) for _, record, _ in keep]
        compared = [Compared.of(record) for _, record, _ in keep]
        words = self._words(compared)
        hashes = [text.hashes() for text in compared]
        columns: dict[str, Sequence[int]] = {
            "length": [len(one.ids) for _, _, one in keep],
            "supervised": [sum(one.mask) for _, _, one in keep],
            "file": [row.file for row, _, _ in keep],
            "line": [row.line for row, _, _ in keep],
            "row": [row.number for row, _, _ in keep],
            "words": [len(row) for row in words],
            "exact": [hash64(text) for text in texts],
            "question": [question for question, _ in hashes],
            "answer": [answer for _, answer in hashes],
        }
        flat = np.fromiter(itertools.chain.from_iterable(words), np.uint32, sum(columns["words"]))
        self.writer.add(flagged(ids, mask), texts, flat, columns)

    def _words(self, compared: Sequence[Compared]) -> list[list[int]]:
        if not self.compares:
            return [[]] * len(compared)
        started = time.monotonic()
        words = [text.words() for text in compared]
        self.copies_s += time.monotonic() - started
        return words


def ignored_codes(config: RunConfig) -> tuple[str, ...]:
    """Return the codes in IGNORABLE that the user ignores by name.

    `--select` does not count: it only chooses what is shown.
    """
    return tuple(code for code in IGNORABLE if code in config.ignore)


def compares(config: RunConfig) -> bool:
    """Return True if near copies are looked for. They are not if all findings that need them are ignored."""
    return any(is_chosen(code, Severity.WARNING, (), config.ignore) for code in ("D031", "D032"))


def _chunks(rows: Iterable[RawRow]) -> Iterator[list[RawRow]]:
    """Yield rows by the thousand, or fewer if they are large, so that memory stays bounded."""
    chunk: list[RawRow] = []
    size_bytes = 0
    for row in rows:
        chunk.append(row)
        size_bytes += row.size_bytes
        if len(chunk) == CHUNK_ROWS or size_bytes > CHUNK_BYTES:
            yield chunk
            chunk, size_bytes = [], 0
    if chunk:
        yield chunk
