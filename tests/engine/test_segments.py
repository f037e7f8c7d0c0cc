"""Where packed rows begin and end."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from lorafit.engine.segments import MAX_PADDED, Segments


@given(st.lists(st.integers(1, 60), min_size=1, max_size=30))
def test_every_token_is_in_exactly_one_place_of_its_own_row(lengths):
    segments = Segments.of_lengths(lengths)
    flat = torch.cat([group.tokens.flatten() for group in segments.groups])
    assert flat[segments.scatter].tolist() == list(range(sum(lengths)))
    row_of = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    for group in segments.groups:
        rows = row_of[group.tokens]
        assert (rows == rows[:, :1]).all(), "a group's row mixes two rows"


@given(st.lists(st.integers(1, 500), min_size=1, max_size=40))
def test_padding_stays_within_its_bound(lengths):
    segments = Segments.of_lengths(lengths)
    assert sum(group.tokens.numel() for group in segments.groups) <= MAX_PADDED * sum(lengths)


def test_boundaries_are_cumulative_lengths():
    segments = Segments.of_lengths([3, 1, 2])
    assert segments.boundaries.tolist() == [0, 3, 4, 6]
    assert segments.boundaries.dtype == torch.int32
    assert segments.longest == 3
