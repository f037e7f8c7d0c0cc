"""Groups of near copies: locality-sensitive hashing over MinHash signatures, every pair checked before it counts.

The scheme is datasketch's MinHashLSH with 16 bands of 4 (Leskovec, Rajaraman, Ullman, "Mining of Massive Datasets",
ch. 3), over sorted arrays: a million rows in Python dictionaries would take minutes and gigabytes.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from lorafit.data.fingerprints import distinct, mixed

BANDS = 16
SIMILARITY = 0.8
PAIRS_AT_ONCE = 1 << 16
Numbers = NDArray[np.int64]


def leaders(count: int, one: Numbers, other: Numbers) -> Numbers:
    """(count,) for each of `count` nodes the first node of its connected component; edges are (one[i], other[i])."""
    leader = np.arange(count)
    while True:
        left, right = leader[one], leader[other]
        apart = left != right
        if not apart.any():
            return leader
        np.minimum.at(leader, np.maximum(left, right)[apart], np.minimum(left, right)[apart])
        while not np.array_equal(shorter := leader[leader], leader):
            leader = shorter


def copies_of(keys: NDArray[np.uint64]) -> tuple[Numbers, Numbers]:
    """Edges from every row (n,) to the first row with the same key."""
    _, first, place = np.unique(keys, return_index=True, return_inverse=True)
    return np.arange(len(keys)), first[place]


def near_copies(signatures: NDArray[np.uint32]) -> tuple[Numbers, Numbers]:
    """Edges between rows whose (n, 64) signatures agree in at least 80 % of their entries."""
    pairs = distinct(np.concatenate([np.zeros(0, np.uint64), *_candidates(signatures)]))
    one, other = (pairs >> np.uint64(32)).astype(np.int64), (pairs & np.uint64(0xFFFFFFFF)).astype(np.int64)
    near = np.zeros(len(pairs), np.bool_)
    for start in range(0, len(pairs), PAIRS_AT_ONCE):
        part = slice(start, start + PAIRS_AT_ONCE)
        near[part] = (signatures[one[part]] == signatures[other[part]]).mean(axis=1) >= SIMILARITY
    return one[near], other[near]


def _candidates(signatures: NDArray[np.uint32]) -> Iterator[NDArray[np.uint64]]:
    """Pairs (first row in the upper, second in the lower 32 bits) that agree in a whole band, band by band."""
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
    """Among rows with the same key: each with the one before it in the order of `second`, and with the first."""
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
