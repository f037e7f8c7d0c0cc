"""Fingerprints: equal for texts that differ in case and blanks only."""

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorafit.data.dedup import Compared, distinct, hash64, mixed
from lorafit.data.schema.records import Record, Turn


def compared(asked: str, answered: str) -> Compared:
    return Compared.of(Record((Turn("user", asked), Turn("assistant", answered)), "x:1"))


def test_case_and_blanks_do_not_count() -> None:
    assert compared("  The  Quick\n\tBrown ", "FOX").hashes() == compared("the quick brown", " fox").hashes()
    assert compared("the quick", "brown fox").hashes()[0] != compared("the quick brown", "fox").hashes()[0]


def test_hash64_is_the_head_of_blake2b() -> None:
    assert hash64(b"abc").to_bytes(8, "little") == hashlib.blake2b(b"abc", digest_size=8).digest()


def test_question_is_everything_before_the_last_answer() -> None:
    turns = (Turn("user", "A"), Turn("assistant", "b"), Turn("user", "C"), Turn("assistant", "D  d"))
    record = Compared.of(Record(turns, "x:1", "Sys"))
    assert (record.question, record.answer) == ([b"sys", b"a", b"b", b"c"], [b"d", b"d"])


@pytest.mark.parametrize(
    ("asked", "answered", "count"),
    [("今日は天気がいいですね", "はい、とても", 17), ("Какая сегодня хорошая погода", "Да очень", 6), ("", "", 1)],
)
def test_a_script_without_blanks_is_compared_letter_by_letter(asked: str, answered: str, count: int) -> None:
    assert len(compared(asked, answered).words()) == count


@given(st.lists(st.integers(0, 2**64 - 1)))
def test_distinct_values_come_sorted(values: list[int]) -> None:
    assert distinct(np.array(values, np.uint64)).tolist() == sorted(set(values))


def test_mixed_is_splitmix64() -> None:
    # the first outputs of Vigna's splitmix64.c for seed 0: the state grows by the golden ratio before each
    state = np.array([0, 0x9E3779B97F4A7C15], np.uint64)
    assert [hex(value) for value in mixed(state).tolist()] == ["0xe220a8397b1dcdaf", "0x6e789e6aa1b965f4"]
