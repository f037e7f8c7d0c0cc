"""Sampling: tokens come as often as their probability says, for every value that a request may send."""

import pytest
import torch

from lorafit.serve.decoding import Sampling
from lorafit.serve.decoding.sampling import FIRST_CANDIDATES, _covering, choose

LOGITS = torch.tensor([-30.0, 25.0, 24.0, 0.0])


@pytest.mark.parametrize("least", [5e-324, 1e-320, 1e-46, 1e-12])
def test_a_tiny_temperature_or_top_p_chooses_the_likeliest_token(least):
    for sampling in (Sampling(temperature=least), Sampling(temperature=1.0, top_p=least), Sampling(least, least)):
        assert choose(LOGITS, sampling, sampling.generator(), ()).token == 1


def test_common_values_draw_from_what_top_p_covers():
    drawn = {choose(LOGITS, Sampling(1.0, 0.99, seed), Sampling(seed=seed).generator(), ()).token for seed in range(40)}
    assert drawn == {1, 2}


def test_tokens_come_as_often_as_their_probability_says():
    probabilities = torch.tensor([0.5, 0.0, 0.3, 0.15, 0.05])
    sampling, draws = Sampling(temperature=1.0, seed=5), 3000
    generator = sampling.generator()
    drawn = [choose(probabilities.log(), sampling, generator, ()).token for _ in range(draws)]
    found = torch.bincount(torch.tensor(drawn), minlength=5) / draws
    assert found[1] == 0
    assert (found - probabilities).abs().max() < 4 * (0.25 / draws) ** 0.5


@pytest.mark.parametrize("top_p", [0.001, 0.3, 0.9, 0.9999])
@pytest.mark.parametrize("spread", [0.01, 3.0], ids=["flat", "steep"])
def test_the_candidates_are_the_fewest_that_cover_top_p(top_p, spread):
    logits = torch.randn(20 * FIRST_CANDIDATES, generator=torch.Generator().manual_seed(1)) * spread
    probabilities = logits.softmax(-1)
    values, ids = _covering(probabilities, top_p)
    ordered = probabilities.sort(descending=True).values
    fewest = int((ordered.cumsum(0) < top_p).sum()) + 1
    assert abs(len(ids) - fewest) <= 1 and torch.equal(probabilities[ids], values)
    assert torch.equal(values, ordered[: len(values)])


def test_logits_that_are_no_numbers_are_an_error():
    with pytest.raises(ValueError, match="no numbers"):
        choose(torch.full((8,), float("nan")), Sampling(temperature=1.0), Sampling().generator(), ())
