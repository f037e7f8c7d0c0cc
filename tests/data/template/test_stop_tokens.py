"""Stop tokens: what the template puts at the end of each kind of answer, and what an older run recorded of them."""

import json
from pathlib import Path

import pytest

import made_tokenizers as made
from lorafit.data import Template
from lorafit.data.tokenizer.tokenizer import TextTokenizer
from template_shapes import CHATML, GPT_OSS, SHAPES, template_of

CALLING = (
    "{{% for m in messages %}}{{{{ '<|im_start|>' + m.role + '\\n' + m.content }}}}{{% for c in m.tool_calls or [] %}}"
    "{{{{ '<tool_call>' + (c.function | tojson) + '</tool_call>' }}}}{{% endfor %}}"
    "{{{{ {end} }}}}{{% endfor %}}{{% if add_generation_prompt %}}{{{{ '<|im_start|>assistant\\n' }}}}{{% endif %}}"
)
IM = {"eos_token": "<|im_end|>", "extra": ["<|im_start|>", "<tool_call>", "</tool_call>", "<|eom|>"]}
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content + ('<|im_end|>' if loop.last else '<|eom|>') }}{% endgeneration %}{% else %}"
    "{{ m.content + '<|im_end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def stops(folder: Path, source: str, **named: object) -> tuple[str, ...]:
    made.special_folder(folder, made.byte_level(), template=source, **named)
    return Template.for_tokenizer(TextTokenizer.from_folder(folder)).stop_tokens


@pytest.mark.parametrize(
    ("source", "named", "expected"),
    [
        (GPT_OSS, SHAPES["harmony"][1], ("<|return|>", "<|call|>")),
        (SHAPES["llama3"][0], SHAPES["llama3"][1], ("<|eot_id|>", "<|eom_id|>")),
        (CALLING.format(end="'<|eom|>' if m.tool_calls else '<|im_end|>'"), IM, ("<|im_end|>", "<|eom|>")),
        # a token that also stands between two calls must not end the first of them
        (CALLING.format(end="'' if m.tool_calls else '<|im_end|>'"), IM, ("<|im_end|>",)),
        (CALLING.format(end="'<|im_end|>'"), IM, ("<|im_end|>",)),
        (MARKED, IM, ("<|im_end|>", "<|eom|>")),
        (CHATML, IM, ("<|im_end|>",)),
    ],
    ids=["gpt-oss", "llama3", "own-end", "between-calls", "one-end", "earlier-answers", "no-calls"],
)
def test_every_kind_of_answer_ends_the_generation(
    tmp_path: Path, source: str, named: dict, expected: tuple[str, ...]
) -> None:
    assert stops(tmp_path, source, **named) == expected


def test_a_run_that_recorded_fewer_stop_tokens_loads_and_stops_at_all(tmp_path: Path) -> None:
    template, path = template_of(tmp_path, "harmony"), tmp_path / "template.json"
    template.save(path)
    saved = json.loads(path.read_text())
    older = {**saved, "stop_ids": saved["stop_ids"][:1], "stop_tokens": saved["stop_tokens"][:1]}
    path.write_text(json.dumps(older))
    assert Template.load(path, template.tokenizer).stop_tokens == ("<|return|>", "<|call|>")


def test_a_recorded_stop_token_that_is_not_derived_is_kept(tmp_path: Path) -> None:
    template, path = template_of(tmp_path, "chatml"), tmp_path / "template.json"
    template.save(path)
    saved = json.loads(path.read_text())
    more = template.tokenizer.encode("<|im_start|>")
    wider = {**saved, "stop_ids": saved["stop_ids"] + more, "stop_tokens": [*saved["stop_tokens"], "<|im_start|>"]}
    path.write_text(json.dumps(wider))
    assert Template.load(path, template.tokenizer).stop_ids == (*template.stop_ids, *more)
