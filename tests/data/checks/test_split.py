"""The held-out split: seeded, by group, and the same for old rows when new ones come."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import made_data as made
from lorafit.data.checks.whole_set import held_out

COUNTS = st.integers(2, 200)


def content(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**63, count).astype(np.uint64)


def alone(count: int) -> np.ndarray:
    return np.arange(count)


def test_the_share_is_about_the_one_asked_for() -> None:
    held = held_out(alone(20_000), content(20_000), 0.05, 0)
    assert 0.044 < held.mean() < 0.056


def test_another_seed_holds_out_other_rows() -> None:
    one, other = (held_out(alone(2000), content(2000), 0.1, seed) for seed in (0, 1))
    assert (one & other).sum() < 0.5 * one.sum()
    assert np.array_equal(one, held_out(alone(2000), content(2000), 0.1, 0))


@given(st.lists(st.integers(0, 30), min_size=2, max_size=120), st.floats(0.01, 0.9), st.integers(0, 5))
def test_a_group_is_never_divided(labels: list[int], share: float, seed: int) -> None:
    groups = np.array([labels.index(label) for label in labels])
    held = held_out(groups, content(len(labels)), share, seed)
    assert all(len(set(held[groups == group])) == 1 for group in set(groups.tolist()))


@given(st.integers(20, 300), st.floats(0.001, 0.99), st.integers(0, 9))
def test_both_sides_have_rows_from_twenty_rows_on(count: int, share: float, seed: int) -> None:
    held = held_out(alone(count), content(count), share, seed)
    assert 0 < held.sum() < count


@given(COUNTS, st.integers(1, 200), st.integers(0, 9))
def test_appended_rows_move_nobody(count: int, more: int, seed: int) -> None:
    count += 100  # below that a side may have to be filled
    before = held_out(alone(count), content(count + more)[:count], 0.2, seed)
    after = held_out(alone(count + more), content(count + more), 0.2, seed)
    assert np.array_equal(before, after[:count])


def test_a_row_appended_to_a_group_follows_its_first_row() -> None:
    hashes = content(400)
    before = held_out(alone(399), hashes[:399], 0.1, 0)
    for leader in np.flatnonzero(before)[:5].tolist():
        groups = alone(400)
        groups[399] = leader
        after = held_out(groups, hashes, 0.1, 0)
        assert after[399]
        assert np.array_equal(before, after[:399])


def test_a_group_larger_than_the_held_out_share_stays_in_training() -> None:
    groups = np.where(alone(200) < 100, 0, alone(200))
    for seed in range(20):
        assert not held_out(groups, content(200), 0.1, seed)[:100].any()


@pytest.mark.parametrize(("count", "share"), [(0, 0.5), (1, 0.5), (100, 0.0)])
def test_nothing_is_held_out_of_next_to_nothing_or_when_nobody_asks(count: int, share: float) -> None:
    assert not held_out(alone(count), content(count), share, 0).any()


def test_the_split_is_written_with_the_place_of_every_row(tmp_path: Path) -> None:
    path = made.write(tmp_path / "rows.jsonl", [made.row(number) for number in range(40)])
    result = made.prepared(path, run_dir=tmp_path / "run", holdout=0.2)
    lines = (tmp_path / "run" / "split.tsv").read_text().splitlines()
    assert lines[0] == "side\tsource"
    sides = {source: side for side, source in (line.split("\t") for line in lines[1:])}
    assert sides == {
        **{result.train.source(place): "train" for place in range(len(result.train))},
        **{result.holdout.source(place): "holdout" for place in range(len(result.holdout))},
    }
    assert len(sides) == 40
