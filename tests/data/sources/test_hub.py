"""Hub datasets: offline is one clear sentence, at once."""

import sys
import time
import types
from pathlib import Path

import pytest

from lorafit.data.sources import tables as hub
from lorafit.errors import DataError


@pytest.fixture(autouse=True)
def _forget() -> None:
    hub.hub_dataset.cache_clear()


def test_offline_is_one_sentence_without_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "_answers", lambda endpoint: False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    started = time.monotonic()
    with pytest.raises(DataError, match="the hub cannot be reached"):
        hub.hub_dataset("someone/some-data")
    assert time.monotonic() - started < 10


def test_rows_of_a_dataset_are_numbered_from_one_and_lose_their_nested_nulls(monkeypatch: pytest.MonkeyPatch) -> None:
    turns = [{"role": "user", "content": "a", "tool_calls": None}]
    fake = types.ModuleType("datasets")
    fake.load_dataset = lambda name, split: [{"messages": turns, "note": None}]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", fake)
    monkeypatch.setattr(hub, "_answers", lambda endpoint: True)
    file = hub.DataFile(Path("x/y"), "x/y", "hub", hub_id="x/y")
    rows = list(hub.hub_rows(0, file))
    assert [(row.line, row.fields) for row in rows] == [
        (1, {"messages": [{"role": "user", "content": "a"}], "note": None})
    ]
