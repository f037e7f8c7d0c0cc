"""MinHash signatures: they estimate the Jaccard similarity of three-word phrases, as datasketch's do."""

from pathlib import Path
from zlib import crc32

import numpy as np
import pytest
from datasketch import MinHash

from lorafit.data import dedup
from lorafit.data.dedup import PERMUTATIONS, signatures
from lorafit.data.store import offsets_of

VOCABULARY = np.array([f"word{number}" for number in range(4000)])


def sign(rows: list[list[str]], folder: Path) -> np.ndarray:
    words = np.array([crc32(word.encode()) for row in rows for word in row], np.uint32)
    return np.array(signatures(words, offsets_of([len(row) for row in rows]), folder))


def phrases(row: list[str]) -> set[tuple[str, ...]]:
    padded = [*row, "", ""]
    return {tuple(padded[place : place + 3]) for place in range(len(row))}


def pairs(count: int, seed: int) -> list[tuple[list[str], list[str]]]:
    random = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        one = random.choice(VOCABULARY, random.integers(20, 200)).tolist()
        other = [word if random.random() > 0.05 else str(random.choice(VOCABULARY)) for word in one]
        made.append((one, other))
    return made


def test_agreeing_entries_estimate_the_jaccard_similarity(tmp_path: Path) -> None:
    rows = pairs(300, 0)
    signed = sign([row for pair in rows for row in pair], tmp_path)
    estimate = (signed[::2] == signed[1::2]).mean(axis=1)
    true = np.array([len(phrases(a) & phrases(b)) / len(phrases(a) | phrases(b)) for a, b in rows])
    error = estimate - true
    # the estimate is binomial: its deviation is sqrt(J (1 - J) / 64) <= 0.0625, its mean error zero
    assert abs(error.mean()) < 0.0625 / np.sqrt(len(rows)) * 4
    assert error.std() < 0.0625 * 1.2


def test_estimates_are_as_good_as_those_of_datasketch(tmp_path: Path) -> None:
    rows = pairs(60, 1)
    signed = sign([row for pair in rows for row in pair], tmp_path)
    ours, theirs = [], []
    for number, (one, other) in enumerate(rows):
        true = len(phrases(one) & phrases(other)) / len(phrases(one) | phrases(other))
        sketches = []
        for row in (one, other):
            sketch = MinHash(num_perm=PERMUTATIONS, seed=1)
            sketch.update_batch(["\0".join(phrase).encode() for phrase in phrases(row)])
            sketches.append(sketch)
        ours.append((signed[2 * number] == signed[2 * number + 1]).mean() - true)
        theirs.append(sketches[0].jaccard(sketches[1]) - true)
    assert np.std(ours) < 1.5 * np.std(theirs)


def test_a_phrase_that_many_rows_share_does_not_make_them_similar(tmp_path: Path) -> None:
    random = np.random.default_rng(2)
    instruction = [f"fixed{number}" for number in range(100)]
    rows = [instruction + random.choice(VOCABULARY, 12).tolist() for _ in range(200)]
    signed = sign(rows, tmp_path)
    assert max((signed[0] == signed[other]).mean() for other in range(1, 200)) < 0.5


def test_rows_of_nothing_but_common_phrases_are_still_compared(tmp_path: Path) -> None:
    random = np.random.default_rng(3)
    rows = [["the", "same", "text", "every", "time"]] * 50 + [random.choice(VOCABULARY, 9).tolist() for _ in range(50)]
    signed = sign(rows, tmp_path)
    assert (signed[0] == signed[49]).all()
    assert (signed[0] == signed[50]).mean() < 0.2


@pytest.mark.parametrize("length", [1, 2, 3])
def test_short_rows_differ_when_their_words_do(tmp_path: Path, length: int) -> None:
    rows = [[f"a{place}" for place in range(length)], [f"b{place}" for place in range(length)]]
    signed = sign([*rows, rows[0]], tmp_path)
    assert (signed[0] == signed[2]).all()
    assert (signed[0] == signed[1]).mean() < 0.1


def test_signatures_do_not_depend_on_the_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [row for pair in pairs(30, 4) for row in pair]
    whole = sign(rows, tmp_path)
    monkeypatch.setattr("lorafit.data.dedup.BLOCK_ROWS", 7)
    assert np.array_equal(sign(rows, tmp_path), whole)


def test_rows_of_many_words_are_signed_in_blocks_of_bounded_size(monkeypatch, tmp_path):
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 400, 60)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    words = rng.integers(0, 2**32, int(offsets[-1]), dtype=np.uint32)
    whole = np.array(dedup.signatures(words, offsets, tmp_path))
    monkeypatch.setattr(dedup, "BLOCK_WORDS", 300)
    found = dedup.blocks(offsets)
    assert [start for start, _ in found[1:]] == [end for _, end in found[:-1]] and found[-1][1] == 60
    assert all(offsets[end] - offsets[start] <= 300 or end == start + 1 for start, end in found)
    assert np.array_equal(dedup.signatures(words, offsets, tmp_path), whole)


def test_long_rows_are_compared_by_an_eighth_of_their_phrases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(3)
    one = random.choice(VOCABULARY, 60_000).tolist()
    near = [word if random.random() > 0.02 else str(random.choice(VOCABULARY)) for word in one]
    other = random.choice(VOCABULARY, 60_000).tolist()
    signed = []

    def counted(phrases: np.ndarray, starts: np.ndarray) -> np.ndarray:
        signed.append(len(phrases))
        return minhash(phrases, starts)

    minhash = dedup._minhash
    monkeypatch.setattr(dedup, "LONG_ROW", 1 << 14)
    monkeypatch.setattr(dedup, "_minhash", counted)
    signatures = sign([one, near, other, one, ["a"] * 40_000], tmp_path)
    assert (signatures[0] == signatures[3]).all()
    assert (signatures[0] == signatures[1]).mean() > 0.8 > 0.1 > (signatures[0] == signatures[2]).mean()
    assert sum(signed) < 280_000 / 6
