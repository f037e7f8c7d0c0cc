import dataclasses

import pytest

from lorafit.planning import DataFacts


def test_facts_are_frozen_and_default_to_no_held_out_rows():
    facts = DataFacts(rows=2, tokens=10, supervised_tokens=4, longest=6, mean_tokens=5.0)
    assert facts.holdout_rows == 0
    with pytest.raises(dataclasses.FrozenInstanceError):
        facts.rows = 3
