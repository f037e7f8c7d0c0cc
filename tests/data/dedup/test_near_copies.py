"""Near copies: pairs over the threshold are found, components are those of a plain union-find."""

import numpy as np
from datasketch import MinHash, MinHashLSH
from hypothesis import given
from hypothesis import strategies as st

from lorafit.data.dedup import duplicates_of, leaders, near_copies

EDGES = st.lists(st.tuples(st.integers(0, 19), st.integers(0, 19)), max_size=30)


@given(EDGES)
def test_leaders_are_the_least_members_of_the_components(edges: list[tuple[int, int]]) -> None:
    component = list(range(20))
    for one, other in edges * 20:
        component = [
            min(component[one], component[other]) if kind in (component[one], component[other]) else kind
            for kind in component
        ]
    one, other = (np.array([edge[side] for edge in edges], np.int64) for side in (0, 1))
    assert leaders(20, one, other).tolist() == component


def test_copies_point_to_the_first_row_with_the_key() -> None:
    one, other = duplicates_of(np.array([7, 5, 7, 7, 5], np.uint64))
    assert list(zip(one.tolist(), other.tolist(), strict=True)) == [(0, 0), (1, 1), (2, 0), (3, 0), (4, 1)]


def signed(random: np.random.Generator, similarity: float, count: int) -> np.ndarray:
    """(2 * count, 64): signatures of `count` pairs that agree in about `similarity` of their entries."""
    one = random.integers(0, 2**32, (count, 64), dtype=np.uint32)
    agree = np.arange(64) < round(64 * similarity)
    agree = np.array([random.permutation(agree) for _ in range(count)])
    other = np.where(agree, one, random.integers(0, 2**32, (count, 64), dtype=np.uint32))
    return np.concatenate([one, other])


def pairs_found(signatures: np.ndarray) -> set[tuple[int, int]]:
    one, other = near_copies(signatures)
    return set(zip(one.tolist(), other.tolist(), strict=True))


def test_close_pairs_are_found_and_distant_ones_are_not() -> None:
    random = np.random.default_rng(0)
    assert len(pairs_found(signed(random, 0.9, 500))) >= 495
    assert len(pairs_found(signed(random, 0.82, 500))) >= 490
    assert pairs_found(signed(random, 0.7, 500)) == set()


def test_close_pairs_are_found_among_rows_that_share_a_band_with_many() -> None:
    random = np.random.default_rng(1)
    signatures = random.integers(0, 2**32, (2000, 64), dtype=np.uint32)
    signatures[:, :4] = 7  # every row shares the first band
    signatures[1500] = signatures[300]
    assert (300, 1500) in pairs_found(signatures)


def test_the_same_pairs_are_found_as_by_datasketch() -> None:
    signatures = signed(np.random.default_rng(2), 0.85, 100)
    index = MinHashLSH(num_perm=64, params=(16, 4))
    for row, entries in enumerate(signatures):
        index.insert(row, MinHash(num_perm=64, hashvalues=entries.astype(np.uint64), scheme="legacy"))
    candidates = {
        (row, other)
        for row, entries in enumerate(signatures)
        for other in index.query(MinHash(num_perm=64, hashvalues=entries.astype(np.uint64), scheme="legacy"))
        if row < other
    }
    close = {pair for pair in candidates if (signatures[pair[0]] == signatures[pair[1]]).mean() >= 0.8}
    assert pairs_found(signatures) == close


def test_no_rows_have_no_near_copies() -> None:
    assert pairs_found(np.zeros((0, 64), np.uint32)) == set()
    assert pairs_found(np.zeros((1, 64), np.uint32)) == set()
