"""Exact and near copies: text hashes, MinHash signatures, locality-sensitive hashing."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from lorafit.data.schema.records import Record, Turn

LONG_WORD = 8


def hash64(text: bytes) -> int:
    """Return the first 64 bits of BLAKE2b of `text`."""
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


class _Letters(dict[str, int]):
    """The CRC-32 of each letter in UTF-8, computed once: rows of scripts without blanks have millions of them."""

    def __missing__(self, letter: str) -> int:
        self[letter] = crc32(letter.encode())
        return self[letter]


LETTERS = _Letters()


@dataclass(frozen=True, slots=True)
class Compared:
    """A record prepared for comparison: its words in UTF-8, in lower case and without blanks.

    `question` is all text before the last answer, `answer` that answer; `letters` counts the characters of both.
    """

    question: list[bytes]
    answer: list[bytes]
    letters: int
    is_document: bool = False

    @classmethod
    def of(cls, record: Record) -> Compared:
        """Return the words of `record`."""
        asked = "\n".join(
            [record.system or "", *(turn.content if not turn.extra else _said(turn) for turn in record.turns[:-1])]
        )
        answered = _said(record.turns[-1])
        words, letters = answered.lower().encode().split(), len(asked) + len(answered)
        return cls(asked.lower().encode().split(), words, letters, record.is_document)

    def hashes(self) -> tuple[int, int]:
        """Return 64-bit hashes of the question and of the answer: equal if all words are."""
        answer = hash64(b" ".join(self.answer))
        # nobody asks for a document: two of them contradict nothing
        return (answer if self.is_document else hash64(b" ".join(self.question))), answer

    def words(self) -> list[int]:
        """Return a 32-bit hash (CRC-32) of every word, or of every letter in scripts without blanks."""
        words = self.question + self.answer
        if self.letters > LONG_WORD * len(words):
            return list(map(LETTERS.__getitem__, b"".join(words).decode())) or [0]
        return list(map(crc32, words)) or [0]


def _said(turn: Turn) -> str:
    """Return the whole text of a turn: its reasoning, its content and its calls."""
    if not turn.extra:
        return turn.content
    return "\n".join(
        [turn.reasoning, turn.content, *(json.dumps(call.get("function"), default=str) for call in turn.calls)]
    )


def mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return SplitMix64's finaliser of `values` (Steele, Lea, Flood 2014): each bit depends on every input bit."""
    with np.errstate(over="ignore"):
        values = values + np.uint64(0x9E3779B97F4A7C15)
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return values ^ (values >> np.uint64(31))


def distinct(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return the distinct values, sorted. `np.unique` hashes from numpy 2.3 on, which takes several times as long."""
    ordered = np.sort(values)
    return ordered[np.append(True, ordered[1:] != ordered[:-1])] if len(ordered) else ordered


PERMUTATIONS = 64
COMMON_SHARE = 0.05
COMMON_ROWS = 10
SAMPLE_ROWS = 4096
MIN_PHRASES = 3
SAMPLE_WORDS = 4 << 20
BLOCK_ROWS = 4096
BLOCK_WORDS = 2 << 20
"""A word takes about fifty bytes on the way: rows of megabytes must not fill the memory."""
THREADS = 2
TABLE_BITS = 22
WHOLE_TEXT = np.uint32(0x5BD1E995)
Words = NDArray[np.uint32]
Counts = NDArray[np.int64]


def signatures(words: Words, offsets: Counts, folder: Path) -> NDArray[np.uint32]:
    """Return (n, 64) signatures of n rows, memory-mapped in `folder`; row r has `words[offsets[r]:offsets[r + 1]]`."""
    count = len(offsets) - 1
    common = common_phrases(words, offsets)
    out = np.lib.format.open_memmap(folder / "signatures.npy", "w+", np.uint32, (count, PERMUTATIONS))

    def sign(block: tuple[int, int]) -> None:
        start, end = block
        phrases, starts = _phrases(words[offsets[start] : offsets[end]], np.diff(offsets[start : end + 1]))
        out[start:end] = _minhash(*_thinned(*_informative(phrases, starts, common)))

    # numpy lets go of the interpreter lock inside its loops, so threads do help
    with ThreadPoolExecutor(THREADS) as pool:
        for _ in pool.map(sign, blocks(offsets)):
            pass
    return out


def blocks(offsets: Counts) -> list[tuple[int, int]]:
    """Return [start, end) of blocks of at most BLOCK_ROWS rows and BLOCK_WORDS words, or of one longer row."""
    count, start = len(offsets) - 1, 0
    found = []
    while start < count:
        fitting = int(np.searchsorted(offsets, offsets[start] + BLOCK_WORDS, side="right")) - 1
        end = max(start + 1, min(start + BLOCK_ROWS, fitting))
        found.append((start, end))
        start = end
    return found


def common_phrases(words: Words, offsets: Counts) -> NDArray[np.bool_]:
    """Return a mask (2**22,) by the upper bits of a phrase's hash: True for phrases that too many rows share."""
    count = len(offsets) - 1
    table = np.zeros(1 << TABLE_BITS, np.bool_)
    sample = np.arange(count)[:: -(-count // SAMPLE_ROWS)] if count else np.zeros(0, np.int64)
    if not len(sample):
        return table
    sample = sample[:: max(1, -(-int(np.diff(offsets)[sample].sum()) // SAMPLE_WORDS))]
    lengths = np.diff(offsets)[sample]
    phrases, starts = _phrases(np.concatenate([words[offsets[row] : offsets[row + 1]] for row in sample]), lengths)
    rows = np.repeat(np.arange(len(sample), dtype=np.uint64), np.diff(np.append(starts, len(phrases))))
    once = distinct((rows << np.uint64(32)) | phrases)
    seen, times = np.unique(once & np.uint64(0xFFFFFFFF), return_counts=True)
    limit = max(COMMON_ROWS, COMMON_SHARE * len(sample))
    table[seen[times > limit].astype(np.uint32) >> np.uint32(32 - TABLE_BITS)] = True
    return table


def _phrases(words: Words, lengths: Counts) -> tuple[NDArray[np.uint32], Counts]:
    """Return (hashes of every three words of rows of these lengths, start of each row).

    A row of n words has n phrases: the last two are shorter than three words. `lengths` (rows,) are at least 1.
    """
    rows = np.arange(len(lengths))
    starts = np.cumsum(lengths) - lengths
    place = np.arange(len(words)) + 2 * np.repeat(rows, lengths)
    padded = np.zeros(len(words) + 2 * len(rows), np.uint64)
    padded[place] = words
    with np.errstate(over="ignore"):
        pair = mixed(padded[place] + (padded[place + 1] << np.uint64(32)))
        phrase = mixed(pair ^ (padded[place + 2] * np.uint64(0x9E3779B97F4A7C15)))
    return (phrase >> np.uint64(32)).astype(np.uint32), starts


def _informative(phrases: Words, starts: Counts, common: NDArray[np.bool_]) -> tuple[Words, Counts]:
    """Return the uncommon phrases and the start of each row. Rows with too few of them keep all of theirs."""
    kept = ~common[phrases >> np.uint32(32 - TABLE_BITS)]
    lengths = np.diff(np.append(starts, len(phrases)))
    whole = np.add.reduceat(kept, starts, dtype=np.int64) < np.minimum(lengths, MIN_PHRASES)
    whole_phrases = np.repeat(whole, lengths)
    # rows compared by all their phrases must not be mistaken for rows compared by some
    phrases = np.where(whole_phrases, phrases ^ WHOLE_TEXT, phrases)
    kept |= whole_phrases
    lengths = np.add.reduceat(kept, starts, dtype=np.int64)
    return phrases[kept], np.cumsum(lengths) - lengths


LONG_ROW = 1 << 16
THINNING = np.uint32(29)


def _thinned(phrases: Words, starts: Counts) -> tuple[Words, Counts]:
    """Return an eighth of the phrases of rows of more than LONG_ROW, chosen by their hashes, and the start of each row.

    Two long rows share as large a part of their eighths as of all their phrases, and signing them takes an eighth.
    """
    lengths = np.diff(np.append(starts, len(phrases)))
    if not len(lengths) or lengths.max() <= LONG_ROW:
        return phrases, starts
    kept = np.repeat(lengths <= LONG_ROW, lengths) | ((phrases * np.uint32(0x9E3779B1)) >> THINNING == 0)
    kept[starts] = True  # a row of one phrase that is repeated keeps it
    lengths = np.add.reduceat(kept, starts, dtype=np.int64)
    return phrases[kept], np.cumsum(lengths) - lengths


def _minhash(phrases: Words, starts: Counts) -> Words:
    """Return (rows, 64): the least phrase of each row under each permutation (times an odd number)."""
    factors = (mixed(np.arange(PERMUTATIONS, dtype=np.uint64)) >> np.uint64(32)).astype(np.uint32) | np.uint32(1)
    out = np.empty((len(starts), PERMUTATIONS), np.uint32)
    for number, factor in enumerate(factors):
        out[:, number] = np.minimum.reduceat(phrases * factor, starts)
    return out


BANDS = 16
SIMILARITY = 0.8
PAIRS_AT_ONCE = 1 << 16
Numbers = NDArray[np.int64]


def leaders(count: int, one: Numbers, other: Numbers) -> Numbers:
    """Return (count,): for each node the first of its connected component. Edges are (one[i], other[i])."""
    leader = np.arange(count)
    while True:
        left, right = leader[one], leader[other]
        apart = left != right
        if not apart.any():
            return leader
        np.minimum.at(leader, np.maximum(left, right)[apart], np.minimum(left, right)[apart])
        while not np.array_equal(shorter := leader[leader], leader):
            leader = shorter


def duplicates_of(keys: NDArray[np.uint64]) -> tuple[Numbers, Numbers]:
    """Return edges from every row (n,) to the first row with the same key."""
    _, first, place = np.unique(keys, return_index=True, return_inverse=True)
    return np.arange(len(keys)), first[place]


def near_copies(signatures: NDArray[np.uint32]) -> tuple[Numbers, Numbers]:
    """Return edges between rows whose (n, 64) signatures agree in at least 80 % of their entries."""
    pairs = distinct(np.concatenate([np.zeros(0, np.uint64), *_candidates(signatures)]))
    one, other = (pairs >> np.uint64(32)).astype(np.int64), (pairs & np.uint64(0xFFFFFFFF)).astype(np.int64)
    near = np.zeros(len(pairs), np.bool_)
    for start in range(0, len(pairs), PAIRS_AT_ONCE):
        part = slice(start, start + PAIRS_AT_ONCE)
        near[part] = (signatures[one[part]] == signatures[other[part]]).mean(axis=1) >= SIMILARITY
    return one[near], other[near]


def _candidates(signatures: NDArray[np.uint32]) -> Iterator[NDArray[np.uint64]]:
    """Yield pairs of rows that agree in a whole band: first row in the upper, second in the lower 32 bits."""
    width = signatures.shape[1] // BANDS
    following = _band_key(signatures[:, -width:])
    for band in range(BANDS):
        key = _band_key(signatures[:, band * width : (band + 1) * width])
        yield _neighbours(key, following)
        following = key


def _band_key(entries: NDArray[np.uint32]) -> NDArray[np.uint64]:
    key = np.zeros(len(entries), np.uint64)
    for column in range(entries.shape[1]):
        key = mixed(key ^ entries[:, column].astype(np.uint64))
    return key


def _neighbours(key: NDArray[np.uint64], second: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return pairs of rows with the same key: each row with the first one, and with its predecessor by `second`."""
    if len(key) < 2:
        return np.zeros(0, np.uint64)
    order = np.argsort(key, kind="stable")
    same = key[order[1:]] == key[order[:-1]]
    shared = order[np.append(False, same) | np.append(same, False)]
    shared = shared[np.lexsort((shared, second[shared], key[shared]))]
    if not len(shared):
        return np.zeros(0, np.uint64)
    same = np.append(False, key[shared[1:]] == key[shared[:-1]])
    place = np.arange(len(shared))
    first = shared[np.maximum.accumulate(np.where(same, 0, place))]
    before = np.append(shared[:1], shared[:-1])
    return np.concatenate([_pairs(before[same], shared[same]), _pairs(first[same], shared[same])])


def _pairs(one: Numbers, other: Numbers) -> NDArray[np.uint64]:
    low, high = np.minimum(one, other).astype(np.uint64), np.maximum(one, other).astype(np.uint64)
    return (low << np.uint64(32)) | high
