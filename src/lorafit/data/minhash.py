"""MinHash signatures (Broder 1997) of many rows at once: the share of equal entries estimates the Jaccard similarity.

A row is the set of its three-word phrases. Phrases that stand in more than 5 % of the rows (a fixed instruction, a
system prompt) say nothing about which rows are copies and are left out, unless fewer than three others remain.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lorafit.data.fingerprints import distinct, mixed

PERMUTATIONS = 64
COMMON_SHARE = 0.05
COMMON_ROWS = 10
SAMPLE_ROWS = 4096
MIN_PHRASES = 3
BLOCK_ROWS = 4096
THREADS = 2
TABLE_BITS = 22
WHOLE_TEXT = np.uint32(0x5BD1E995)
Words = NDArray[np.uint32]
Counts = NDArray[np.int64]


def signatures(words: Words, offsets: Counts, folder: Path) -> NDArray[np.uint32]:
    """(n, 64) signatures of n rows, memory-mapped in `folder`; row r has `words[offsets[r]:offsets[r + 1]]`."""
    count = len(offsets) - 1
    common = common_phrases(words, offsets)
    out = np.lib.format.open_memmap(folder / "signatures.npy", "w+", np.uint32, (count, PERMUTATIONS))

    def sign(start: int) -> None:
        end = min(start + BLOCK_ROWS, count)
        phrases, starts = _phrases(words[offsets[start] : offsets[end]], np.diff(offsets[start : end + 1]))
        out[start:end] = _signed(*_telling(phrases, starts, common))

    # numpy lets go of the interpreter lock inside its loops, so threads do help
    with ThreadPoolExecutor(THREADS) as pool:
        for _ in pool.map(sign, range(0, count, BLOCK_ROWS)):
            pass
    return out


def common_phrases(words: Words, offsets: Counts) -> NDArray[np.bool_]:
    """A table (2**22,) by the upper bits of a phrase's hash: True for phrases that too many rows share."""
    count = len(offsets) - 1
    table = np.zeros(1 << TABLE_BITS, np.bool_)
    sample = np.arange(count)[:: -(-count // SAMPLE_ROWS)] if count else np.zeros(0, np.int64)
    if not len(sample):
        return table
    lengths = np.diff(offsets)[sample]
    phrases, starts = _phrases(np.concatenate([words[offsets[row] : offsets[row + 1]] for row in sample]), lengths)
    rows = np.repeat(np.arange(len(sample), dtype=np.uint64), np.diff(np.append(starts, len(phrases))))
    once = distinct((rows << np.uint64(32)) | phrases)
    seen, times = np.unique(once & np.uint64(0xFFFFFFFF), return_counts=True)
    limit = max(COMMON_ROWS, COMMON_SHARE * len(sample))
    table[seen[times > limit].astype(np.uint32) >> np.uint32(32 - TABLE_BITS)] = True
    return table


def _phrases(words: Words, lengths: Counts) -> tuple[NDArray[np.uint32], Counts]:
    """(hashes of every three words of rows of these lengths, where each row's begin).

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


def _telling(phrases: Words, starts: Counts, common: NDArray[np.bool_]) -> tuple[Words, Counts]:
    """The phrases that are not common, and where each row's begin; rows with too few of them keep all of theirs."""
    kept = ~common[phrases >> np.uint32(32 - TABLE_BITS)]
    lengths = np.diff(np.append(starts, len(phrases)))
    whole = np.add.reduceat(kept, starts, dtype=np.int64) < np.minimum(lengths, MIN_PHRASES)
    whole_phrases = np.repeat(whole, lengths)
    # rows compared by all their phrases must not be mistaken for rows compared by some
    phrases = np.where(whole_phrases, phrases ^ WHOLE_TEXT, phrases)
    kept |= whole_phrases
    lengths = np.add.reduceat(kept, starts, dtype=np.int64)
    return phrases[kept], np.cumsum(lengths) - lengths


def _signed(phrases: Words, starts: Counts) -> Words:
    """(rows, 64): per permutation of the 32-bit numbers (times an odd number), the least phrase of each row."""
    factors = (mixed(np.arange(PERMUTATIONS, dtype=np.uint64)) >> np.uint64(32)).astype(np.uint32) | np.uint32(1)
    out = np.empty((len(starts), PERMUTATIONS), np.uint32)
    for number, factor in enumerate(factors):
        out[:, number] = np.minimum.reduceat(phrases * factor, starts)
    return out
