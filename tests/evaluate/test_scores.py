"""Scores of one answer, and the noise of means."""

import json
import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorafit.evaluate.scores import exact_match, json_scores, token_f1
from lorafit.evaluate.statistics import bootstrap, paired, share

LEAVES = st.none() | st.booleans() | st.integers(-5, 5) | st.text(max_size=4)
JSON = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
)


def test_exact_match_ignores_outer_blanks_only():
    assert exact_match("billing", " billing\n") == 1
    assert exact_match("billing", "Billing") == exact_match("billing", "billing.") == 0


@pytest.mark.parametrize(
    ("expected", "answer", "f1"),
    [
        ("The red lamp.", "a red lamp", 1.0),
        ("red lamp", "blue lamp", 0.5),
        ("red lamp", "green door", 0.0),
        ("red red lamp", "red lamp", 0.8),
        ("", "", 1.0),
        ("", "something", 0.0),
        ("Zürich", "Zu\u0308rich", 1.0),
    ],
)
def test_token_f1_counts_shared_words(expected, answer, f1):
    assert token_f1(expected, answer) == pytest.approx(f1)


@pytest.mark.parametrize(
    ("answer", "valid", "equal", "fields"),
    [
        ('{"item": "jar", "n": 3}', 1, 1, 1.0),
        ('{"n": 3.0, "item": "jar"}', 1, 1, 1.0),
        ('{"item": "jar", "n": 4}', 1, 0, 0.5),
        ('{"item": "jar"}', 1, 0, 0.5),
        ('{"item": "jar", "n": 3, "x": 1}', 1, 0, 2 / 3),
        ('{"item": "jar", "n": "3"}', 1, 0, 0.5),
        ('{"item": "jar", "n": 3', 0, 0, 0.0),
        ("[" * 100_000, 0, 0, 0.0),
    ],
)
def test_json_fields_are_compared_by_path_and_kind(answer, valid, equal, fields):
    scores = json_scores({"item": "jar", "n": 3}, answer)
    assert scores == {"json_valid": valid, "json_equal": equal, "json_fields": pytest.approx(fields)}


def test_true_is_not_one():
    assert json_scores([True], "[1]")["json_equal"] == 0


@given(JSON, JSON)
def test_json_is_equal_where_python_says_so(first, second):
    assert json_scores(first, json.dumps(first))["json_equal"] == 1
    alike = json.dumps(first, sort_keys=True) == json.dumps(second, sort_keys=True)
    assert (json_scores(first, json.dumps(second))["json_equal"] == 1) == alike


def test_wilsons_interval_has_the_values_of_the_book():
    estimate = share([1.0] * 8 + [0.0] * 2)
    assert (estimate.low, estimate.high) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert share([1.0] * 20).high == 1.0
    assert share([1.0] * 20).low == pytest.approx(0.8389, abs=1e-4)


def test_the_bootstrap_interval_is_that_of_the_normal_law_on_many_rows():
    values = np.random.default_rng(3).normal(2.0, 1.0, 400)
    estimate = bootstrap(values.tolist())
    half = 1.96 * values.std() / math.sqrt(400)
    assert estimate.high - estimate.mean == pytest.approx(half, rel=0.08)
    assert bootstrap(values.tolist()) == estimate, "the same seed gives the same interval"


def test_weights_make_the_mean_one_of_tokens():
    assert bootstrap([1.0, 3.0], [3.0, 1.0]).mean == pytest.approx(1.5)


def test_a_paired_difference_sees_what_two_intervals_hide():
    draw = random.Random(0)
    first = [draw.gauss(0, 10) for _ in range(50)]
    second = [value + 0.5 + draw.gauss(0, 0.1) for value in first]
    assert paired(first, second).verdict == "better"
    assert paired(first, second, higher_is_better=False).verdict == "worse"
    assert paired(first, first).verdict == "no difference shown"
