"""Fingerprints of a record's text: 64-bit hashes for exact questions, 32-bit word hashes for near copies."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from lorafit.data.records import Record

LONG_WORD = 8


def hash64(text: bytes) -> int:
    """The first 64 bits of BLAKE2b of `text`."""
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


@dataclass(frozen=True, slots=True)
class Compared:
    """A record as copies are looked for, in lower case and without blanks: its words in UTF-8.

    `question` is all text before the last answer, `answer` that answer; `letters` counts the characters of both.
    """

    question: list[bytes]
    answer: list[bytes]
    letters: int

    @classmethod
    def of(cls, record: Record) -> Compared:
        """The words of `record`."""
        asked = "\n".join([record.system or "", *(turn.content for turn in record.turns[:-1])])
        answered = record.turns[-1].content
        return cls(asked.lower().encode().split(), answered.lower().encode().split(), len(asked) + len(answered))

    def hashes(self) -> tuple[int, int]:
        """64-bit hashes of the question and of the answer: equal when all words are."""
        return hash64(b" ".join(self.question)), hash64(b" ".join(self.answer))

    def words(self) -> list[int]:
        """A 32-bit hash (CRC-32) of every word; of every letter, in scripts that put no blanks between words."""
        words = self.question + self.answer
        if self.letters > LONG_WORD * len(words):
            words = [letter.encode() for letter in b"".join(words).decode()]
        return list(map(crc32, words)) or [0]


def mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finaliser (Steele, Lea, Flood 2014): every bit of the result depends on every bit of the value."""
    with np.errstate(over="ignore"):
        values = values + np.uint64(0x9E3779B97F4A7C15)
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return values ^ (values >> np.uint64(31))


def distinct(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The different values, sorted; `np.unique` hashes from numpy 2.3 on, which takes several times as long."""
    ordered = np.sort(values)
    return ordered[np.append(True, ordered[1:] != ordered[:-1])] if len(ordered) else ordered
