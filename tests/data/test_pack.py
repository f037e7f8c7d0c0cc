"""Packing loses no row, repeats none, exceeds no micro-batch, and fills them well."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorafit.data import pack
from lorafit.data.pack import Fill, epoch_order, largest_step, pack_step, packed_fill, steps, steps_per_epoch
from lorafit.errors import DataError

GOLDEN_ORDER = [10, 4, 0, 11, 8, 6, 7, 1, 3, 9, 2, 5]
row_lengths = st.lists(st.integers(0, 100), max_size=60)


def lognormal(count: int) -> np.ndarray:
    return np.clip(np.random.default_rng(0).lognormal(4.7, 0.8, count), 4, 2048).astype(np.int32)


@given(lengths=row_lengths, max_tokens=st.integers(100, 300))
def test_every_row_is_in_exactly_one_micro_batch_that_has_room_for_it(lengths: list[int], max_tokens: int) -> None:
    packed = pack_step(lengths, max_tokens)
    assert sorted(row for batch in packed for row in batch) == list(range(len(lengths)))
    assert all(batch and sum(lengths[row] for row in batch) <= max_tokens for batch in packed)
    # best-fit decreasing leaves no two micro-batches that would fit into one
    sums = sorted(sum(lengths[row] for row in batch) for batch in packed)
    assert len(sums) < 2 or sums[0] + sums[1] > max_tokens


@given(
    lengths=row_lengths,
    examples=st.integers(1, 20),
    seed=st.integers(0, 2**32 - 1),
    epoch=st.integers(0, 5),
)
def test_every_epoch_has_every_row_once_in_steps_of_the_asked_size(
    lengths: list[int], examples: int, seed: int, epoch: int
) -> None:
    found = [np.concatenate(step) for step in steps(np.array(lengths), examples, 100, seed, epoch)]
    assert len(found) == steps_per_epoch(len(lengths), examples)
    assert all(len(rows) == examples for rows in found[:-1])
    assert sorted(np.concatenate(found)) == list(range(len(lengths))) if found else not lengths
    # a step is a set of examples: packing does not move a row to another step
    order = epoch_order(len(lengths), seed, epoch)
    for place, rows in enumerate(found):
        assert set(rows) == set(order[place * examples : (place + 1) * examples])


@given(lengths=row_lengths, examples=st.integers(1, 20), seed=st.integers(0, 9))
def test_predicted_fill_is_what_the_first_epoch_has(lengths: list[int], examples: int, seed: int) -> None:
    made = list(steps(np.array(lengths), examples, 100, seed, 0))
    micro_batches = sum(map(len, made))
    fill = packed_fill(np.array(lengths), examples, 100, seed)
    assert (fill.micro_batches, fill.steps) == (micro_batches, len(made))
    assert fill.share == pytest.approx(sum(lengths) / (100 * micro_batches) if lengths else 0)


@given(lengths=row_lengths, examples=st.integers(1, 20), seed=st.integers(0, 9), count=st.integers(1, 200))
def test_no_step_of_the_run_is_larger_than_the_largest(
    lengths: list[int], examples: int, seed: int, count: int
) -> None:
    sizes, found = np.array(lengths, dtype=np.int32), []
    for epoch in range(count):
        if lengths and len(found) < count:
            found += [np.concatenate(step) for step in steps(sizes, examples, 100, seed, epoch)]
    largest = largest_step(sizes, examples, seed, count)
    assert sizes[largest].sum() == max((sizes[rows].sum() for rows in found[:count]), default=0)
    assert not found or any(set(largest) <= set(rows) for rows in found[:count])


def test_of_large_data_one_epoch_is_looked_through_for_the_largest_step(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = lognormal(1000)
    monkeypatch.setattr(pack, "ROWS_SEEN", 10)
    first = [sum(sizes[np.concatenate(step)]) for step in steps(sizes, 16, 2048, 0, 0)]
    assert sizes[largest_step(sizes, 16, 0, 1000)].sum() == max(first)


def test_order_is_decided_by_seed_and_epoch_alone() -> None:
    assert np.array_equal(epoch_order(1000, 3, 2), epoch_order(1000, 3, 2))
    orders = {tuple(epoch_order(1000, seed, epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


def test_order_is_the_same_on_every_machine_and_version() -> None:
    assert epoch_order(12, 0, 0).tolist() == GOLDEN_ORDER
    assert epoch_order(0, 0, 0).tolist() == []


def test_order_is_a_fair_shuffle() -> None:
    places = np.array([np.argsort(epoch_order(100, seed, 0)) for seed in range(400)])
    # the mean place of a row over 400 shuffles: 49.5 with a deviation of 1.44
    assert np.abs(places.mean(axis=0) - 49.5).max() < 6
    neighbours = np.mean([np.abs(np.diff(epoch_order(1000, seed, 1))).mean() for seed in range(20)])
    assert neighbours == pytest.approx(1000 / 3, rel=0.05)


def test_packing_is_deterministic_and_keeps_ties_in_order() -> None:
    assert pack_step([5, 5, 5, 3, 3], 10) == [[0, 1], [2, 3], [4]] == pack_step(np.array([5, 5, 5, 3, 3]), 10)
    assert pack_step([], 10) == []


def test_a_row_longer_than_a_micro_batch_is_one_sentence() -> None:
    with pytest.raises(DataError, match="a row of 11 tokens does not fit a micro-batch of 10; raise max_length"):
        pack_step([3, 11], 10)


def test_large_steps_are_at_least_97_percent_full() -> None:
    lengths = lognormal(100_000)
    assert packed_fill(lengths, len(lengths), 2048).share > 0.99
    assert packed_fill(lengths, 256, 2048).share > 0.97


def test_the_usual_step_of_16_short_rows_takes_fewer_than_two_micro_batches() -> None:
    fill = packed_fill(lognormal(20_000), 16, 2048)
    assert fill.micro_batches / fill.steps < 2
    assert fill.share == pytest.approx(0.68, abs=0.02)


def test_no_rows_fill_nothing() -> None:
    assert packed_fill(np.array([], dtype=int), 16, 2048) == Fill(0.0, 0, 0)
