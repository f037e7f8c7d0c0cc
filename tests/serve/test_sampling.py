"""Sampling with the smallest values that a request may send."""

import pytest
import torch

from lorafit.serve.decoding import Sampling
from lorafit.serve.decoding.sampling import choose

LOGITS = torch.tensor([-30.0, 25.0, 24.0, 0.0])


@pytest.mark.parametrize("least", [5e-324, 1e-320, 1e-46, 1e-12])
def test_a_tiny_temperature_or_top_p_chooses_the_likeliest_token(least):
    for sampling in (Sampling(temperature=least), Sampling(temperature=1.0, top_p=least), Sampling(least, least)):
        assert choose(LOGITS, sampling, sampling.generator(), ()).token == 1


def test_common_values_draw_from_what_top_p_covers():
    drawn = {choose(LOGITS, Sampling(1.0, 0.99, seed), Sampling(seed=seed).generator(), ()).token for seed in range(40)}
    assert drawn == {1, 2}
