"""A DoRA run: trained, merged, answered; and refused where an adapter is only added to the base."""

import pytest

from little_run import write_rows
from lorafit.api.load import load
from lorafit.api.merge import merge
from lorafit.api.ship.export import export
from lorafit.api.train import train
from lorafit.demo import BASE
from lorafit.errors import UsageError
from lorafit.serve.launch import _require_run

SETTINGS = {"dora": True, "rank": 4, "lr": 5e-3, "max_steps": 6, "examples_per_step": 8}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dora")
    return train(write_rows(folder / "tickets.jsonl", 40), str(BASE), out=folder / "run", **SETTINGS)


def test_its_merge_is_the_trained_model(run):
    assert merge(run.run.path, onto="quantized").verification.passed


def test_it_answers(run):
    assert load(run.run.path).answer("Route this ticket to a queue.", max_new_tokens=3)


def test_programs_that_add_adapters_refuse_it_in_one_sentence(run):
    with pytest.raises(UsageError, match="the run is DoRA, which rescales the base's weights"):
        _require_run(run.run.path)
    with pytest.raises(UsageError, match="vLLM serves no DoRA adapters; export it with --to merged"):
        export(run.run.path, to="adapter")
