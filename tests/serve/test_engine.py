"""The engine in this process answers with the adapter, without it, and after it is gone."""

import pytest

from lorafit.errors import UsageError
from lorafit.serve import InProcessEngine

QUESTION = [{"role": "user", "content": "Route this ticket to a queue.\nThe courier lost my red lamp."}]


def test_an_adapter_is_added_used_and_removed(tiny_run):
    engine = InProcessEngine(tiny_run.resolved.config)
    prompt = tiny_run.template.prompt_ids(QUESTION)
    asked = {"stop_ids": tiny_run.template.stop_ids, "max_new_tokens": 8}
    base = engine.generate(prompt, adapter=None, **asked)
    engine.add_adapter("mine", tiny_run.run.adapter)
    streamed = []
    tuned = engine.generate(prompt, adapter="mine", on_token=streamed.append, **asked)
    assert tuned and tuned == streamed[: len(tuned)] and tuned != base
    assert engine.generate(prompt, adapter=None, **asked) == base
    engine.remove_adapter("mine")
    assert engine.generate(prompt, adapter=None, **asked) == base
    engine.add_adapter("again", tiny_run.run.adapter)
    assert engine.generate(prompt, adapter="again", **asked) == tuned


def test_adapters_that_are_not_there_and_second_ones_are_refused(tiny_run):
    engine = InProcessEngine(tiny_run.resolved.config)
    asked = {"stop_ids": [0], "max_new_tokens": 1}
    for ask in (lambda: engine.remove_adapter("x"), lambda: engine.generate([1], adapter="x", **asked)):
        with pytest.raises(UsageError, match="no adapter of this name is loaded; add it first"):
            ask()
    engine.add_adapter("mine", tiny_run.run.adapter)
    with pytest.raises(UsageError, match="holds one adapter and already has mine; remove mine first"):
        engine.add_adapter("yours", tiny_run.run.adapter)
