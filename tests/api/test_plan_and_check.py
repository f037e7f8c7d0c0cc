"""check and plan: no torch, the same reading of the data that train makes."""

import json
import subprocess
import sys

import numpy as np
import pytest

import lorafit
from little_run import write_rows
from lorafit.demo import BASE
from lorafit.errors import DataError, UsageError
from lorafit.training.batches import StepDataset


@pytest.fixture
def data(tmp_path):
    return write_rows(tmp_path / "rows.jsonl", 60)


def test_check_counts_rows_and_tokens(data):
    report = lorafit.check(data, str(BASE))
    summary = report.prepared.summary
    assert report.ok
    assert (summary.read, summary.kept) == (60, 60)
    assert summary.train_rows + summary.holdout_rows == 60
    assert 0 < summary.supervised_tokens < summary.tokens


def test_check_without_a_base_needs_no_tokenizer(data):
    report = lorafit.check(data)
    assert report.ok
    assert not report.prepared.summary.tokenised


def test_plan_gives_every_decision_a_reason(data):
    planned = lorafit.plan(data, str(BASE), gpu="RTX 4090")
    assert planned.plan.method == "QLoRA"
    assert all(decision.reason for decision in planned.plan.decisions)
    assert planned.resolved.config.compute == "bf16"
    assert planned.plan.targets == ("q_proj", "v_proj")


def test_the_plan_knows_the_largest_step_that_train_will_run(data):
    planned = lorafit.plan(data, str(BASE), gpu="RTX 4090", examples_per_step=8, epochs=4.0, max_length=256)
    steps, found = StepDataset(planned.prepared.train, planned.resolved.config), []
    for epoch in range(4):
        found += [step.tokens for step in steps.epoch(epoch)]
    assert planned.plan.stats.largest_step == max(found) > 256
    policy = planned.resolved.config.memory_policy
    assert policy.endswith(f"micro_tokens={max(found)},cuda_graph_max_tokens={max(found)}")
    assert planned.to_dict()["plan"]["data"]["largest_step"] == max(found)


@pytest.mark.parametrize("on_long", ["error", "drop"])
def test_no_plan_is_made_where_every_row_is_too_long(data, on_long):
    with pytest.raises(
        DataError, match=r"no row is left to train on: rows are longer than max_length \(16\)"
    ) as caught:
        lorafit.plan(data, str(BASE), gpu="RTX 4090", max_length=16, on_long=on_long)
    assert "raise max_length, or set on_long: split-turns" in str(caught.value) and "\n" not in str(caught.value)
    assert any(
        finding.code == "D020" for finding in lorafit.check(data, str(BASE), max_length=16, on_long=on_long).findings
    )


def test_both_say_what_is_missing(data, tmp_path):
    with pytest.raises(UsageError, match="no base model"):
        lorafit.plan(data)
    with pytest.raises(DataError):
        lorafit.check(tmp_path / "nowhere.jsonl")


@pytest.mark.parametrize("verb", ["check", "plan"])
def test_neither_imports_torch_or_transformers(data, verb):
    code = (
        "import sys, lorafit\n"
        f"lorafit.{verb}({str(data)!r}, {str(BASE)!r})\n"
        "heavy = {'torch', 'transformers', 'peft', 'bitsandbytes'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_array_on_one_line_holds_out_what_its_rows_in_lines_do(data, tmp_path):
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    (tmp_path / "array.json").write_text(json.dumps(rows))
    in_lines, array = (lorafit.check(path, BASE).prepared.summary for path in (data, tmp_path / "array.json"))
    assert array.holdout_rows == in_lines.holdout_rows > 0
    assert array.train_rows == in_lines.train_rows


@pytest.mark.parametrize(
    "data", [3, 0, b"rows.jsonl", np.zeros(2), [{"prompt": "a", "completion": "b"}], {"rows.jsonl"}]
)
def test_what_are_no_data_are_refused_in_one_sentence(data):
    with pytest.raises(UsageError, match="cannot be read; pass paths"):
        lorafit.check(data, BASE)


def test_paths_may_be_paths(data):
    as_words = lorafit.plan(str(data), str(BASE), holdout=str(data), max_steps=3).resolved.config
    assert lorafit.plan(data, BASE, holdout=data, max_steps=3).resolved.config == as_words
    assert lorafit.check([data], base=BASE).resolved.config.base == str(BASE)


def test_a_recipe_finds_its_data_beside_it(data):
    recipe = data.parent / "recipe.yaml"
    recipe.write_text(f"data: rows.jsonl\nbase: {BASE}\nrank: 4\n")
    planned = lorafit.plan(recipe)
    assert planned.prepared.summary.read == 60
    assert (planned.resolved.config.rank, planned.resolved.sources["rank"]) == (4, "recipe")


def test_local_paths_are_recorded_absolute_and_hub_ids_as_they_are(data, tmp_path, monkeypatch):
    from lorafit.api.settings import settle

    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    config = settle(["rows.jsonl", "hub/dataset"], {"base": "base", "holdout": "rows.jsonl"}).config
    assert config.data == (str(tmp_path / "rows.jsonl"), "hub/dataset")
    assert (config.base, config.holdout) == (str(tmp_path / "base"), str(tmp_path / "rows.jsonl"))
    assert settle("rows.jsonl", {"base": "some/model", "holdout": 0.1}).config.base == "some/model"


def test_what_is_beside_a_recipe_wins_over_the_same_name_here(data, tmp_path, monkeypatch):
    from lorafit.api.settings import settle

    here = tmp_path / "here"
    here.mkdir()
    (here / "rows.jsonl").write_text("")
    recipe = data.parent / "recipe.yaml"
    recipe.write_text(f"data: rows.jsonl\nbase: {BASE}\n")
    monkeypatch.chdir(here)
    assert settle(str(recipe), {}).config.data == (str(data),)
