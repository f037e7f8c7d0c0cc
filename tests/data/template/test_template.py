"""Template: six real shapes and the fallback, held to transformers' rendering and to golden ids."""

import errno
import json
import os
import pickle
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

import made_tokenizers as made
from lorafit.data.schema.records import Record, Turn
from lorafit.data.template.layout import (
    CONTENT_CHANGED,
    NOT_PREFIX_STABLE,
    PROMPT_DIFFERS,
    PROMPT_SPLIT,
    REFUSED,
    TOO_LARGE,
    TOOLS_IGNORED,
)
from lorafit.data.template.template import BOS_DOUBLED, NOT_TEXT, STOP_MISSING, Encoded, Template
from lorafit.data.tokenizer.tokenizer import TextTokenizer
from lorafit.errors import RunDirError, TemplateError
from lorafit.runs import run_dir

GOLDEN = made.TEMPLATES / "golden.json"
SYSTEM_FREE = {"gemma"}
TOOL_FAMILIES = ("llama3", "qwen2_5", "qwen3", "mistral")
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": "ü"}}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {}}}}}


def record(*contents: str, system: str | None = None) -> Record:
    """User and assistant in turn, the user first."""
    roles = ("user", "assistant") * len(contents)
    return Record(tuple(Turn(role, content) for role, content in zip(roles, contents)), "rows.jsonl:1", system)


def tool_record() -> Record:
    turns = (
        Turn("user", "Add 1 and ü."),
        Turn("assistant", "", {"tool_calls": [CALL]}),
        Turn("tool", '{"sum": "1ü"}', {"name": "add"}),
        Turn("assistant", "It is 1ü."),
    )
    return Record(turns, "rows.jsonl:7", tools=(TOOL,))


RECORDS = {
    "plain": record("What is it?", "It is the end."),
    "system": record("Hi", "Hello.", system="Answer in one word."),
    "turns": record("Hi there", "Hello!", "And 12 + 34?", "46, and\n\nthat is it."),
    "unicode": record("Grüße 你好 🙂\r\n\r\n\tx = [1,  2]  ", "é👩‍👩‍👧\n\n```py\nprint('the')\n```\n"),
    "tools": tool_record(),
}


def cases(family: str) -> dict[str, Record]:
    wanted = dict(RECORDS)
    if family in SYSTEM_FREE:
        wanted.pop("system")
    if family not in TOOL_FAMILIES:
        wanted.pop("tools")
    return wanted


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("families")
    return {family: made.family_folder(home / family, family) for family in made.FAMILIES}


@pytest.fixture(scope="module")
def templates(folders: dict[str, Path]) -> dict[str, Template]:
    return {family: Template.for_tokenizer(TextTokenizer.from_folder(folder)) for family, folder in folders.items()}


def template_of(folder: Path, source: str | None, **special: object) -> Template:
    """A template over a tokenizer with `<s>`, `</s>` and ChatML's tokens."""
    named = {"bos_token": "<s>", "eos_token": "</s>", "extra": ["<|im_start|>", "<|im_end|>"], **special}
    made.special_folder(folder, made.byte_level(), template=source, **named)
    return Template.for_tokenizer(TextTokenizer.from_folder(folder))


def supervised(template: Template, encoded: Encoded) -> str:
    ids = [token for token, kept in zip(encoded.ids, encoded.mask) if kept]
    return template.tokenizer.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize("family", made.FAMILIES)
def test_ids_are_those_of_transformers_apply_chat_template(
    family: str, folders: dict[str, Path], templates: dict[str, Template]
) -> None:
    theirs = AutoTokenizer.from_pretrained(folders[family])
    today = {"date_string": "26 Jul 2024"} if family == "llama3" else {}
    for example in cases(family).values():
        messages = [{**each, "content": each["content"].replace("\r\n", "\n").rstrip()} for each in example.messages()]
        tools = list(example.tools) or None
        ids = theirs.apply_chat_template(messages, tools, return_dict=False, **today)
        asked = theirs.apply_chat_template(messages[:-1], tools, add_generation_prompt=True, return_dict=False, **today)
        assert templates[family].encode(example).ids == ids
        assert templates[family].prompt_ids(example.prompt, example.tools) == asked


@pytest.mark.parametrize("family", made.FAMILIES)
def test_ids_and_masks_are_the_golden_ones(family: str, templates: dict[str, Template]) -> None:
    template = templates[family]
    seen = {}
    for name, example in cases(family).items():
        encoded = template.encode(example)
        seen[name] = {
            "text": template.tokenizer.decode(encoded.ids, skip_special_tokens=False),
            "supervised": supervised(template, encoded),
            "problems": list(encoded.problems),
            "ids": encoded.ids,
            "mask": "".join("01"[kept] for kept in encoded.mask),
        }
    assert seen == json.loads(GOLDEN.read_text(encoding="utf-8"))[family]


TAGGED = (
    "{%- for m in messages -%}{{- '<|im_start|>' + m.role + '\n' -}}"
    "{%- if m.role == 'assistant' -%}{%- generation -%}{{- INSIDE -}}{%- endgeneration -%}{{- OUTSIDE -}}"
    "{%- else -%}{{- m.content + '<|im_end|>\n' -}}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)


def tagged(inside: str, outside: str) -> str:
    return TAGGED.replace("INSIDE", inside).replace("OUTSIDE", outside)


@pytest.mark.parametrize(
    ("inside", "outside"),
    [
        ("m.content + '<|im_end|>'", "'\n'"),
        ("m.content + '<|im_end|>\n'", "''"),
        ("m.content", "'<|im_end|>\n'"),
        ("m.content", "'\n<|im_end|>\n'"),
    ],
)
def test_generation_tags_make_the_mask_and_each_turn_ends_with_its_stop_token(
    inside: str, outside: str, tmp_path: Path
) -> None:
    template = template_of(tmp_path, tagged(inside, outside))
    encoded = template.encode(RECORDS["turns"])
    gap = "\n" if outside.startswith("'\n<") else ""
    assert supervised(template, encoded) == f"Hello!{gap}<|im_end|>46, and\n\nthat is it.{gap}<|im_end|>"
    assert encoded.problems == ()


def test_the_mask_of_generation_tags_is_that_of_transformers(tmp_path: Path) -> None:
    template = template_of(tmp_path, tagged("m.content + '<|im_end|>'", "'\n'"))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for name in ("plain", "system", "turns"):
        expected = theirs.apply_chat_template(
            RECORDS[name].messages(), return_dict=True, return_assistant_tokens_mask=True
        )
        encoded = template.encode(RECORDS[name])
        assert encoded.ids == expected["input_ids"]
        assert encoded.mask == list(map(bool, expected["assistant_masks"]))


def fallback(folder: Path, **special: object) -> Template:
    return template_of(folder, None, **special)


def test_the_fallback_is_the_documented_text(tmp_path: Path) -> None:
    template = fallback(tmp_path)
    row = record("Translate.\r\nthe end  ", "das Ende\n")
    assert template.name == "fallback" and template.stop_tokens == ("</s>",)
    assert template.render(row.messages()) == "<|user|>\nTranslate.\nthe end<|end|>\n<|assistant|>\ndas Ende</s>"
    assert template.prompt_text(row.prompt) == "<|user|>\nTranslate.\nthe end<|end|>\n<|assistant|>\n"
    assert supervised(template, template.encode(row)) == "das Ende</s>"


def test_the_fallback_separates_turns_and_puts_the_system_text_first(tmp_path: Path) -> None:
    template = fallback(tmp_path)
    row = record("Hi", "Hello!", "More", "No.", system="Be kind.")
    assert template.render(row.messages()) == (
        "<|system|>\nBe kind.<|end|>\n<|user|>\nHi<|end|>\n<|assistant|>\nHello!</s>\n"
        "<|user|>\nMore<|end|>\n<|assistant|>\nNo.</s>"
    )
    assert supervised(template, template.encode(row)) == "Hello!</s>No.</s>"


@pytest.mark.parametrize("adds_bos", [True, False])
def test_the_fallback_starts_with_bos_exactly_when_the_tokenizer_adds_it(adds_bos: bool, tmp_path: Path) -> None:
    template = fallback(tmp_path, adds_bos=adds_bos)
    ids = template.encode(RECORDS["plain"]).ids
    assert (ids[0] == template.tokenizer.bos_id) is adds_bos
    assert ids.count(template.tokenizer.bos_id) == adds_bos


@pytest.mark.parametrize("adds_bos", [True, False])
def test_the_fallback_as_exported_jinja_gives_the_same_ids_and_masks(adds_bos: bool, tmp_path: Path) -> None:
    direct = fallback(tmp_path / "base", adds_bos=adds_bos)
    exported = template_of(tmp_path / "export", direct.jinja_for_export, adds_bos=adds_bos)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "export")
    assert (direct.name, exported.name) == ("fallback", "chat_template")
    assert exported.stop_ids == direct.stop_ids
    for name in ("plain", "system", "turns", "unicode"):
        row = RECORDS[name]
        assert exported.encode(row) == direct.encode(row)
        asked = theirs.apply_chat_template(row.prompt, add_generation_prompt=True, return_dict=False)
        assert direct.prompt_ids(row.prompt) == exported.prompt_ids(row.prompt) == asked


def test_the_fallback_needs_an_eos_token(tmp_path: Path) -> None:
    made.special_folder(tmp_path, made.byte_level(), bos_token="<s>")
    with pytest.raises(TemplateError, match="neither a chat template nor an EOS token"):
        Template.for_tokenizer(TextTokenizer.from_folder(tmp_path))


def test_tools_that_the_template_cannot_show_are_reported(tmp_path: Path, templates: dict[str, Template]) -> None:
    assert TOOLS_IGNORED in fallback(tmp_path).encode(tool_record()).problems
    assert TOOLS_IGNORED in templates["phi3"].encode(tool_record()).problems
    assert templates["qwen2_5"].encode(tool_record()).problems == ()


def test_a_template_that_rewrites_earlier_turns_supervises_the_last_alone(templates: dict[str, Template]) -> None:
    row = record("Hi", "<think>\nmm\n</think>\n\nHello!", "And?", "<think>\nhm\n</think>\n\nNo.")
    encoded = templates["qwen3"].encode(row)
    assert supervised(templates["qwen3"], encoded) == "<think>\nhm\n</think>\n\nNo.<|im_end|>"
    assert encoded.problems == (NOT_PREFIX_STABLE,)


def test_a_row_that_the_template_refuses_keeps_its_words_and_the_others_go_on(templates: dict[str, Template]) -> None:
    good, bad = RECORDS["plain"], RECORDS["system"]
    encoded = templates["gemma"].encode_many([good, bad, good])
    assert encoded[0] == encoded[2] == templates["gemma"].encode(good)
    assert encoded[1] == Encoded([], [], (REFUSED,), "System role not supported")
    with pytest.raises(TemplateError, match=r"refuses the conversation \(System role not supported\)"):
        templates["gemma"].prompt_ids(bad.prompt)


def test_text_after_the_last_answer_is_left_out(templates: dict[str, Template]) -> None:
    row = record("Hi", "Hello!")
    longer = Record((*row.turns, Turn("user", "unanswered")), row.source)
    assert templates["llama3"].encode(longer) == templates["llama3"].encode(row)


def test_what_the_assistant_says_before_anybody_asks_is_not_supervised(templates: dict[str, Template]) -> None:
    greeting = (Turn("assistant", "Welcome."), Turn("user", "Hi"), Turn("assistant", "Hello."))
    for family in ("llama3", "qwen2_5", "phi3"):
        encoded = templates[family].encode(Record(greeting, "rows.jsonl:1"))
        assert supervised(templates[family], encoded).startswith("Hello.<|")
        assert encoded.problems == ()


def test_values_of_numpy_reach_the_template_as_numbers(templates: dict[str, Template]) -> None:
    call = {"function": {"name": "add", "arguments": {"a": np.int64(1), "b": np.float32(0.5), "c": {1}}}}
    turns = (Turn("user", "Hi"), Turn("assistant", "", {"tool_calls": [call], "content": None}))
    encoded = templates["qwen2_5"].encode(Record(turns, "rows.jsonl:1"))
    assert '{"a": 1, "b": 0.5, "c": "<set>"}' in supervised(templates["qwen2_5"], encoded)


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        (CHATML.replace("<|im_end|>", ""), STOP_MISSING),
        (CHATML.replace("<|im_end|>", "<|unknown|>"), STOP_MISSING),
        (CHATML.replace("m.content +", "m.content[:8] +"), CONTENT_CHANGED),
        (CHATML.replace("assistant\n' }}", "assistant\n<think>' }}"), PROMPT_DIFFERS),
        ("{{ bos_token }}{{ bos_token }}" + CHATML, BOS_DOUBLED),
    ],
)
def test_what_a_template_does_wrong_is_reported_with_the_row(source: str, problem: str, tmp_path: Path) -> None:
    assert problem in template_of(tmp_path, source).encode(RECORDS["plain"]).problems


def test_a_prompt_that_the_tokenizer_splits_otherwise_before_an_answer_is_reported(tmp_path: Path) -> None:
    source = CHATML.replace("m.role + '\n'", "m.role + '\n\n'").replace("assistant\n' }}", "assistant\n\n' }}")
    for name, split, problems in (("gpt2", "gpt2", (PROMPT_SPLIT,)), ("llama3", made.LLAMA3_SPLIT, ())):
        backend = made.byte_level(split=split)
        extra = ["<|im_start|>", "<|im_end|>"]
        made.special_folder(tmp_path / name, backend, template=source, eos_token="</s>", extra=extra)
        template = Template.for_tokenizer(TextTokenizer.from_folder(tmp_path / name))
        assert template.problems == template.encode(RECORDS["plain"]).problems == problems


def test_lone_surrogates_and_huge_rows_cost_only_themselves(tmp_path: Path, templates: dict[str, Template]) -> None:
    good = RECORDS["plain"]
    for template in (templates["qwen2_5"], fallback(tmp_path)):
        rows = [good, record("Hi", "half \ud800"), record("x" * (5 << 20), "yes"), good]
        encoded = template.encode_many(rows)
        assert encoded[0] == encoded[3] == template.encode(good)
        assert [(row.ids, row.problems) for row in encoded[1:3]] == [([], (NOT_TEXT,)), ([], (TOO_LARGE,))]


def test_no_rows_are_no_encoded_rows(tmp_path: Path, templates: dict[str, Template]) -> None:
    assert templates["qwen2_5"].encode_many([]) == fallback(tmp_path).encode_many(iter(())) == []


def test_a_thousand_rows_come_back_in_order(templates: dict[str, Template]) -> None:
    rows = [record(f"number {place}", str(place)) for place in range(1000)]
    encoded = templates["qwen2_5"].encode_many(iter(rows))
    assert [supervised(templates["qwen2_5"], row) for row in encoded] == [f"{n}<|im_end|>" for n in range(1000)]


def test_threads_and_pickled_copies_encode_alike(templates: dict[str, Template]) -> None:
    template, rows = templates["qwen2_5"], [RECORDS["turns"]] * 50
    expected = template.encode_many(rows)
    with ThreadPoolExecutor(4) as pool:
        assert all(found == expected for found in pool.map(template.encode_many, [rows] * 8))
    assert pickle.loads(pickle.dumps(template)).encode_many(rows) == expected


def test_forked_workers_encode_with_children_of_their_own(templates: dict[str, Template]) -> None:
    template, rows = templates["qwen2_5"], [RECORDS["turns"]] * 5
    expected = template.encode_many(rows)
    with ProcessPoolExecutor(2, mp_context=get_context("fork")) as pool:
        assert all(found == expected for found in pool.map(template.encode_many, [rows] * 4))
    assert template.encode_many(rows) == expected


@pytest.mark.parametrize("family", [*made.FAMILIES, None])
def test_a_saved_template_loads_as_it_was(family: str | None, templates: dict[str, Template], tmp_path: Path) -> None:
    template = templates[family] if family else fallback(tmp_path / "base")
    template.save(tmp_path / "template.json")
    again = Template.load(tmp_path / "template.json", template.tokenizer)
    assert again.sha256 == template.sha256 and again.stop_ids == template.stop_ids and again.name == template.name
    assert again.encode(RECORDS["plain"]) == template.encode(RECORDS["plain"])
    saved = json.loads((tmp_path / "template.json").read_text())
    assert saved["golden"] and all(golden["ids"] for golden in saved["golden"])


def damaged(path: Path, **changes: object) -> Path:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return path


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"jinja": "{{ messages }}"}, "not the one whose SHA-256 was saved"),
        ({"stop_ids": [1]}, "served prompt would differ .* stop token has changed"),
        ({"golden": [{"messages": [{"role": "user", "content": "Hi"}], "ids": [1]}]}, 'the prompt for "Hi" differs'),
        ({"format": 9}, "not the one whose"),
        ({"golden": []}, "not the one whose"),
        ({"golden": [{"messages": [{}]}]}, "is no template.json"),
        ({"jinja": 3}, "is no template.json"),
    ],
)
def test_a_changed_template_file_is_refused_in_one_sentence(
    changes: dict, says: str, templates: dict[str, Template], tmp_path: Path
) -> None:
    templates["gemma"].save(tmp_path / "template.json")
    path = damaged(tmp_path / "template.json", **changes)
    with pytest.raises(TemplateError, match=says) as caught:
        Template.load(path, templates["gemma"].tokenizer)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"\xff", b'"x"'])
def test_a_file_that_is_no_template_is_refused(content: bytes, tmp_path: Path, templates: dict[str, Template]) -> None:
    (tmp_path / "template.json").write_bytes(content)
    with pytest.raises(TemplateError, match=r"template\.json: (the text )?is (no|not) "):
        Template.load(tmp_path / "template.json", templates["gemma"].tokenizer)
    with pytest.raises(TemplateError, match="cannot be read"):
        Template.load(tmp_path / "missing.json", templates["gemma"].tokenizer)


def test_a_disk_that_takes_no_more_is_one_sentence(
    templates: dict[str, Template], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(run_dir, "new_own", full)
    with pytest.raises(RunDirError, match=r"template\.json: .* cannot be written \(No space left on device\)"):
        templates["gemma"].save(tmp_path / "template.json")
    assert not list(tmp_path.iterdir())


def test_another_tokenizer_is_refused_because_its_prompts_differ(
    templates: dict[str, Template], tmp_path: Path
) -> None:
    templates["gemma"].save(tmp_path / "template.json")
    other = made.byte_level(["th", "he"])
    made.special_folder(tmp_path, other, **made.FAMILIES["gemma"])
    with pytest.raises(TemplateError, match="served prompt would differ from the trained one"):
        Template.load(tmp_path / "template.json", TextTokenizer.from_folder(tmp_path))


def test_the_exported_template_keeps_the_date_that_was_trained(
    folders: dict[str, Path], templates: dict[str, Template], tmp_path: Path
) -> None:
    assert "strftime_now(" not in templates["llama3"].jinja_for_export
    theirs = AutoTokenizer.from_pretrained(folders["llama3"])
    theirs.chat_template = templates["llama3"].jinja_for_export
    asked = RECORDS["turns"].prompt
    ids = theirs.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
    assert ids == templates["llama3"].prompt_ids(asked)


texts = st.text(st.characters(exclude_categories=["Cs"])) | st.text("ab \n\r\t<|>`é", max_size=20)
conversations = st.lists(st.tuples(texts, texts), min_size=1, max_size=3)


@pytest.fixture(scope="module")
def fallbacks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Template, Template]:
    """The fallback in Python, and the same as exported Jinja."""
    home = tmp_path_factory.mktemp("fallbacks")
    direct = fallback(home / "base", adds_bos=True)
    return direct, template_of(home / "export", direct.jinja_for_export, adds_bos=True)


@given(turns=conversations, system=st.none() | texts)
def test_the_fallback_and_its_jinja_never_disagree(
    turns: list, system: str | None, fallbacks: tuple[Template, Template]
) -> None:
    row = record(*(text for pair in turns for text in pair), system=system)
    direct, jinja = fallbacks
    assert direct.render(row.messages()) == jinja.render(row.messages())
    assert direct.prompt_text(row.prompt) == jinja.prompt_text(row.prompt)
    assert direct.encode(row).ids == jinja.encode(row).ids


@given(turns=conversations)
def test_the_served_prompt_is_how_the_training_row_begins(
    turns: list, fallbacks: tuple[Template, Template], templates: dict[str, Template]
) -> None:
    row = record(*(text for pair in turns for text in pair))
    for template in (fallbacks[0], templates["llama3"], templates["qwen2_5"], templates["mistral"]):
        prompt, encoded = template.prompt_ids(row.prompt), template.encode(row)
        if not encoded.problems:
            assert encoded.ids[: len(prompt)] == prompt
            assert not any(encoded.mask[: len(prompt)][-1:])
