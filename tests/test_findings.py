"""Findings: which are chosen, and that they survive being written down."""

import pytest

from lorafit.data.checks.findings import CODES as DATA_CODES
from lorafit.findings import CODES, Finding, Severity, chosen, explanations, is_code_prefix

WARNING, ERROR = (Finding("D044", severity, "seen") for severity in (Severity.WARNING, Severity.ERROR))


@pytest.mark.parametrize(
    ("select", "ignore", "warns", "stops"),
    [
        ((), (), True, True),
        (("D04", "P"), (), True, True),
        (("D03",), (), False, True),  # an error is no matter of choice
        ((), ("D0",), False, True),  # nor of a prefix, under which it would go unseen
        ((), ("D04", "P5"), False, True),
        ((), ("P5",), True, True),
        ((), ("D044",), False, False),
        (("D044",), ("D044",), False, False),
    ],
)
def test_warnings_are_chosen_by_prefix_and_errors_hidden_by_their_whole_code(select, ignore, warns, stops):
    assert bool(chosen([WARNING], select, ignore)) is warns
    assert bool(chosen([ERROR], select, ignore)) is stops


def test_a_finding_is_read_as_it_was_written():
    finding = Finding("D044", Severity.WARNING, "seen", "a.jsonl:3", "why", "fix", 2, ("a.jsonl:3", "a.jsonl:9"))
    assert Finding.from_dict(finding.to_dict()) == finding


def test_every_code_is_explained_and_no_other():
    assert list(explanations()) == list(CODES)
    assert all(title and text for title, text in explanations().values())
    assert set(DATA_CODES) <= set(CODES)


def test_a_prefix_of_no_code_is_none():
    assert is_code_prefix("D") and is_code_prefix("D044") and is_code_prefix("P5")
    assert not any(is_code_prefix(text) for text in ("", "D99", "X", "D0441"))
