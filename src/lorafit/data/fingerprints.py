"""Fingerprints of a record's text: 64-bit hashes for exact questions, 32-bit word hashes for near copies."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from lorafit.data.records import Record

LONG_WORD = 12


def normalised(text: str) -> str:
    """Lower case, every run of white space one blank: what copies are compared in."""
    return " ".join(text.lower().split())


def hash64(text: bytes) -> int:
    """The first 64 bits of BLAKE2b of `text`."""
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


@dataclass(frozen=True, slots=True)
class Compared:
    """A record as copies are looked for: all text before the last answer, and the last answer, normalised."""

    question: bytes
    answer: bytes

    @classmethod
    def of(cls, record: Record) -> Compared:
        """The two texts of `record` in UTF-8."""
        before = "\n".join([record.system or "", *(turn.content for turn in record.turns[:-1])])
        return cls(normalised(before).encode(), normalised(record.turns[-1].content).encode())

    def words(self) -> list[int]:
        """A 32-bit hash (CRC-32) of every word; of every letter, in scripts that put no blanks between words."""
        text = self.question + b" " + self.answer
        words = text.split()
        if len(text) > LONG_WORD * len(words):
            words = [letter.encode() for letter in text.decode() if letter != " "]
        return list(map(crc32, words)) or [0]


def mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finaliser (Steele, Lea, Flood 2014): every bit of the result depends on every bit of the value."""
    with np.errstate(over="ignore"):
        values = values + np.uint64(0x9E3779B97F4A7C15)
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return values ^ (values >> np.uint64(31))
