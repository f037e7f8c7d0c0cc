"""A row's `chat_template_kwargs` reach its chat template, in training and wherever the row is rendered again."""

import json
from pathlib import Path
from typing import Any

import pytest

import made_data as made
from lorafit.data import Template, parse_rows
from lorafit.data.store import record_from_json, record_to_json
from lorafit.errors import DataError
from template_shapes import template_of

TALK = {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]}
OFF = {"enable_thinking": False}
THINKING_OFF: list[dict[str, Any]] = [
    {**TALK, "chat_template_kwargs": OFF},
    {**TALK, "chat_template_kwargs": json.dumps(OFF)},
    {**TALK, "chat_template_kwargs": {**OFF, "from_arrow": None}},
    {"prompt": "2+2?", "completion": "4", "chat_template_kwargs": OFF},
    {"instruction": "2+2?", "output": "4", "chat_template_kwargs": OFF},
    {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}], "chat_template_kwargs": OFF},
]


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Template:
    return template_of(tmp_path_factory.mktemp("qwen3"), "qwen3")


def taught(template: Template, row: dict[str, Any]) -> str:
    one = template.encode(parse_rows([row])[0])
    assert not one.problems
    return template.tokenizer.decode([i for i, kept in zip(one.ids, one.mask) if kept], skip_special_tokens=False)


def test_thinking_that_the_row_turns_off_is_part_of_the_prompt(qwen3: Template) -> None:
    assert taught(qwen3, TALK) == "<think>\n\n</think>\n\n4<|im_end|>"
    assert {taught(qwen3, row) for row in THINKING_OFF} == {"4<|im_end|>"}


def test_the_stored_row_keeps_them() -> None:
    record = parse_rows(THINKING_OFF[:1])[0]
    assert record_from_json(record_to_json(record), record.source) == record


def test_a_variable_that_the_template_does_not_read_is_told(tmp_path: Path) -> None:
    rows = [{**TALK, "chat_template_kwargs": {"enable_thinking": False}}]
    path = made.write(tmp_path / "rows.jsonl", rows)
    result = made.prepared(path, template_of(tmp_path, "chatml"), holdout=0.0)
    assert "'enable_thinking'" in made.found(result, "D054").message and len(result.train) == 1


@pytest.mark.parametrize("value", ["{", [1], 5, {"messages": []}, {"add_generation_prompt": True}], ids=str)
def test_variables_that_cannot_be_given_are_an_error(value: Any) -> None:
    with pytest.raises(DataError, match="row:1: the field 'chat_template_kwargs'"):
        parse_rows([{**TALK, "chat_template_kwargs": value}])
