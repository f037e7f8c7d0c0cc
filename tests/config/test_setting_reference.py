"""The reference of settings, of which screen and docs are made."""

import pytest

from lorafit.config import RunConfig, parse_assignments, resolve
from lorafit.config.setting_reference import ADVICE, EXAMPLES, describe_setting


def test_every_setting_has_advice_and_no_other_has():
    assert set(ADVICE) == set(RunConfig.model_fields)
    assert set(EXAMPLES) <= set(RunConfig.model_fields)


@pytest.mark.parametrize("key", RunConfig.model_fields)
def test_every_example_can_be_typed_as_it_stands(key):
    described = describe_setting(key)
    assert resolve(flags=parse_assignments([described.assignment])).sources[key] in ("flag", "default")
    assert described.meaning and described.values


def test_a_setting_without_advice_is_shown_without(monkeypatch):
    monkeypatch.delitem(ADVICE, "lr")
    assert describe_setting("lr").advice == ""


def test_a_default_that_the_plan_may_replace_says_so():
    assert describe_setting("rank").shown_default == "16 (or as planned)"
    assert describe_setting("warmup").shown_default == "0.05"
    assert describe_setting("gpu").shown_default == "–"
