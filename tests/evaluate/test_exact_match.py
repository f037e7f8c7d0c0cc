"""Exact match counts what it says it counts."""

from little_run import encoded_rows
from lorafit.evaluate import exact_match
from lorafit.evaluate.exact_match import Sample


def test_the_share_is_that_of_the_matching_samples(tiny_run):
    result = exact_match(tiny_run.model, tiny_run.held_out_rows.select(range(6)), tiny_run.template)
    assert len(result.samples) == 6
    assert result.share == sum(sample.matches for sample in result.samples) / len(result.samples)
    assert all(sample.source.count(":") >= 1 for sample in result.samples)


def test_a_match_ignores_outer_space_only():
    assert Sample("p", "billing", " billing\n", "f:1").matches
    assert not Sample("p", "billing", "Billing", "f:1").matches
    assert not Sample("p", "billing", "billing.", "f:1").matches


def test_no_rows_match_nothing(tiny_run):
    assert exact_match(tiny_run.model, encoded_rows(5).select([]), tiny_run.template).share == 0.0
