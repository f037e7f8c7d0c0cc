"""Layout: every row once, no micro-batch over its limit unless it is a single row."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorafit.training.batches import Layout


@given(st.lists(st.integers(1, 50), min_size=1, max_size=30), st.integers(1, 80))
def test_every_row_stands_in_one_micro_batch_and_only_a_lone_row_may_exceed_the_limit(lengths, limit):
    sizes = np.array(lengths)
    chosen = np.arange(len(sizes))[::-1]
    layout = Layout(limit).of(sizes, chosen)
    assert sorted(int(row) for part in layout for row in part) == list(range(len(sizes)))
    assert all(len(part) == 1 or sizes[part].sum() <= limit for part in layout)


@given(st.lists(st.integers(1, 2000), min_size=1, max_size=30), st.integers(1, 4000))
def test_padded_rows_stay_within_the_limit_and_little_is_padded(lengths, limit):
    sizes = np.array(lengths)
    layout = Layout(limit, padded=True)
    parts = layout.of(sizes, np.arange(len(sizes))[::-1])
    assert sorted(int(row) for part in parts for row in part) == list(range(len(sizes)))
    for part in parts:
        assert len(part) == 1 or layout.tokens_of(sizes, part) == len(part) * sizes[part].max() <= limit
        rows = sizes[part].sum()
        assert layout.tokens_of(sizes, part) <= max(1.25 * rows, rows + 512)


@pytest.mark.parametrize("padded", [False, True])
def test_halving_the_limit_ends_in_single_rows(padded):
    sizes = np.array([40, 30, 20, 10])
    layout = Layout(100, padded)
    while any(len(part) > 1 for part in layout.of(sizes, np.arange(4))):
        layout.micro_tokens //= 2
    assert [len(part) for part in layout.of(sizes, np.arange(4))] == [1, 1, 1, 1]
