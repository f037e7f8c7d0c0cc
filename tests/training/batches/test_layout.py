"""Layout: every row once, no micro-batch over its limit unless it is a single row."""

import numpy as np
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


def test_halving_the_limit_ends_in_single_rows():
    sizes = np.array([40, 30, 20, 10])
    layout = Layout(100)
    while any(len(part) > 1 for part in layout.of(sizes, np.arange(4))):
        layout.micro_tokens //= 2
    assert [len(part) for part in layout.of(sizes, np.arange(4))] == [1, 1, 1, 1]
