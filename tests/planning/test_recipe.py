import pytest
import yaml

from lorafit.config import RunConfig, load_recipe, resolve
from lorafit.hardware import hardware_named
from lorafit.planning import make_plan, plan_recipe
from planning_shapes import TINY, facts, shape

FLAGS = {
    "base": "models/a base",
    "data": ("a.jsonl", "b: c.jsonl"),
    "out": "runs/#1",
    "field_map": {"response": "text"},
}


def recipe(tmp_path, hardware="4090", rows=2_000, **flags):
    resolved = resolve({}, flags)
    plan = make_plan(resolved, facts(rows=rows), shape(TINY), hardware_named(hardware))
    path = tmp_path / "recipe.yaml"
    path.write_text(plan_recipe(plan, resolved.config), encoding="utf-8")
    return resolved.planned(plan.settings()).config, path


@pytest.mark.parametrize(
    "flags",
    [
        {},
        FLAGS,
        {"targets": "all-linear", "rank": 64, "memory_policy": "keep"},
        {"targets": ("q_proj", "up_proj"), "lr": 1e-5, "holdout": "held out.jsonl", "gpu_memory": "8GiB", "seed": 7},
        {"base": "on", "out": "no", "goal": "latency", "compute": "fp16"},
        {"method": "full"},
    ],
)
def test_the_recipe_reproduces_the_plan(tmp_path, flags):
    config, path = recipe(tmp_path, **flags)
    assert resolve(load_recipe(path)).config == config


def test_planning_the_recipe_again_changes_nothing(tmp_path):
    config, path = recipe(tmp_path, **FLAGS)
    again = resolve(load_recipe(path))
    plan = make_plan(again, facts(), shape(TINY), hardware_named("4090"))
    assert again.planned(plan.settings()).config == config
    assert {decision.source for decision in plan.decisions} == {"recipe"}


def test_each_planned_setting_carries_its_reason(tmp_path):
    _, path = recipe(tmp_path)
    lines = dict(line.split(":", 1) for line in path.read_text().splitlines() if not line.startswith("#"))
    assert "# plan: 2,000 rows" in lines["rank"]


def test_a_full_recipe_beyond_one_gpu_is_one_for_more_gpus(tmp_path):
    flags = {"goal": "accuracy", "base": "models/x", "data": ("a.jsonl",)}
    plan = make_plan(resolve({}, flags), facts(rows=200_000), shape(), hardware_named("RTX 3060"))
    path = tmp_path / "recipe.yaml"
    path.write_text(plan_recipe(plan, resolve({}, flags).config), encoding="utf-8")
    text = path.read_text()
    assert text.startswith("# full fine-tuning of a-base: for a machine with 13 GPUs of this kind")
    loaded = yaml.safe_load(text)
    assert set(loaded) <= set(RunConfig.model_fields), "lorafit reads it"
    assert (loaded["method"], loaded["compute"], loaded["memory_policy"]) == ("full", "bf16", "recompute")
    assert loaded["gpus"] >= 2
