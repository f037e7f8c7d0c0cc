"""Summary: a histogram that holds every row, and JSON that says it all."""

import json
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

import made_data as made
from lorafit.data.summary import Histogram


@given(st.lists(st.integers(0, 100_000), max_size=50))
def test_every_length_falls_into_one_bin(lengths: list[int]) -> None:
    histogram = Histogram.of(np.array(lengths, np.int32))
    assert sum(histogram.counts) == len(lengths)
    assert list(histogram.edges) == sorted(set(histogram.edges))
    for low, high, count in zip(histogram.edges, histogram.edges[1:], histogram.counts, strict=False):
        assert count == sum(low <= length < high for length in lengths)


def test_a_summary_is_json_with_the_counts_and_the_histogram(tmp_path: Path) -> None:
    path = made.write(tmp_path / "rows.jsonl", [made.row(1), made.row(2), made.row(2), {"instruction": "a"}])
    fields = json.loads(json.dumps(made.prepared(path).summary.to_dict()))
    assert {name: fields[name] for name in ("read", "kept", "rejected", "dropped", "truncated", "duplicates")} == {
        "read": 4,
        "kept": 3,
        "rejected": 1,
        "dropped": 0,
        "truncated": 0,
        "duplicates": 1,
    }
    assert set(fields["histogram"]) == {"edges", "counts"}
    assert fields["shape"] == "instruction/input/response"
    assert fields["tokenised"] is False
    assert fields["histogram"] == {"edges": [], "counts": []}
