"""Hostile chat templates end in one sentence, in bounded time and memory; harmless ones are not disturbed."""

import os
import re
import signal
import time
from pathlib import Path

import pytest

import made_tokenizers as made
from lorafit.data.schema.records import Record, Turn
from lorafit.data.template.layout import REFUSED
from lorafit.data.template.renderer import Refusal, Rendering, Request, TemplateRenderer
from lorafit.data.template.template import Template
from lorafit.data.tokenizer.tokenizer import TextTokenizer
from lorafit.errors import TemplateError

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
HOSTILE = {
    "nested ranges": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "long text": "{% for a in range(99999) %}{{ 'x' * 99999 }}{% endfor %}",
    "string times": "{{ 'x' * 10**11 }}",
    "power": "{{ 9 ** (9 ** 9) }}",
    "doubling": "{% set ns = namespace(s='x') %}{% for a in range(99) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "joining": "{% set ns = namespace(s='x') %}{% for a in range(99) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "doubling lists": "{% set ns = namespace(s=[1]) %}{% for a in range(99) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "replace": "{{ ('a' * 99999) | replace('a', 'b' * 999999) }}",
    "padding": "{{ 'a' | center(10**10) }}",
    "format": "{{ '%99999999999d' | format(1) }}",
    "endless macro": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "branching macro": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(99) }}",
    "recursive loop": "{% for a in [messages] recursive %}{{ loop([a]) }}{% endfor %}",
    "sorting": "{% for a in range(9999) %}{{ range(99999) | sort(reverse=true) | length }}{% endfor %}",
    "nesting": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
}


def template_of(folder: Path, source: str) -> Template:
    extra = ["<|im_start|>", "<|im_end|>"]
    made.special_folder(folder, made.byte_level(), template=source, eos_token="</s>", extra=extra)
    return Template.for_tokenizer(TextTokenizer.from_folder(folder))


def record(asked: str, line: int = 1) -> Record:
    return Record((Turn("user", asked), Turn("assistant", "yes")), f"rows.jsonl:{line}")


@pytest.mark.parametrize("source", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_template_is_one_sentence_within_five_seconds(source: str, tmp_path: Path) -> None:
    started = time.monotonic()
    with pytest.raises(TemplateError) as caught:
        template_of(tmp_path, source + CHATML)
    assert time.monotonic() - started < 5
    assert "the chat template" in str(caught.value) and "\n" not in str(caught.value)


def test_a_renderer_cannot_take_more_than_512_mb() -> None:
    renderer = TemplateRenderer("{{ messages[0].content }}", {})
    renderer.render(Request([{"role": "user", "content": "hi"}]))
    limits = Path(f"/proc/{renderer._child.process.pid}/limits").read_text()
    assert re.search(rf"Max address space +{512 << 20} +{512 << 20} ", limits)
    assert re.search(r"Max file size +0 +0 ", limits)


@pytest.mark.parametrize("trap", [HOSTILE["nested ranges"], HOSTILE["string times"], HOSTILE["endless macro"]])
def test_a_template_that_turns_hostile_on_one_row_is_stopped_there_and_named(trap: str, tmp_path: Path) -> None:
    template = template_of(tmp_path, "{% if 'trap' in messages[0].content %}" + trap + "{% endif %}" + CHATML)
    rows = [record("trap" if line == 333 else "hi", line) for line in range(400)]
    expected = template.encode(rows[0])
    with pytest.raises(TemplateError, match=r"rows\.jsonl:333: the chat template does not end within bounds"):
        template.encode_many(rows)
    assert template.encode(record("hi")) == expected


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ raise_exception.__globals__.items() }}",
        "{% include '/etc/passwd' %}",
        "{% for %}",
        "{{ 1 / 0 }}",
        "{{ undefined.attribute }}",
        "{{ messages[0].content.nothing() }}",
    ],
)
def test_a_template_that_reaches_out_or_fails_is_refused_in_one_sentence(source: str, tmp_path: Path) -> None:
    with pytest.raises(TemplateError) as caught:
        template_of(tmp_path, source + CHATML)
    assert "\n" not in str(caught.value)


def test_the_renderer_starts_again_after_its_child_died() -> None:
    renderer = TemplateRenderer("{{ messages[0].content }}", {})
    request = Request([{"role": "user", "content": "hi"}])
    assert renderer.render(request) == Rendering("hi")
    os.kill(renderer._child.process.pid, signal.SIGKILL)
    with pytest.raises(TemplateError, match="its process died"):
        renderer.render(request)
    assert renderer.render(request) == Rendering("hi")


def test_ctrl_c_in_the_terminal_does_not_reach_the_renderer() -> None:
    renderer = TemplateRenderer("{{ messages[0].content }}", {})
    renderer.render(Request([{"role": "user", "content": "hi"}]))
    assert os.getpgid(renderer._child.process.pid) != os.getpgid(0)


def test_a_template_cannot_flood_its_caller() -> None:
    renderer = TemplateRenderer("{{ 'x' * 1000000 }}", {})
    requests = [Request([{"role": "user", "content": "hi"}], where=f"rows.jsonl:{n}") for n in range(30)]
    with pytest.raises(TemplateError, match="more than 512 MB"):
        renderer.render_many(requests, lambda answers: None)


def test_an_interrupted_batch_leaves_no_answers_for_the_next_one() -> None:
    renderer = TemplateRenderer("{{ messages[0].content }}", {})
    requests = [Request([{"role": "user", "content": str(place)}]) for place in range(2000)]

    def interrupt(answers: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        renderer.render_many(requests, interrupt)
    assert renderer.render(requests[7]) == Rendering("7")


def test_children_end_with_their_renderer() -> None:
    renderer = TemplateRenderer("{{ messages[0].content }}", {})
    renderer.render(Request([{"role": "user", "content": "hi"}]))
    process = renderer._child.process
    del renderer
    assert process.poll() is not None


def test_messages_reach_the_template_as_they_are() -> None:
    renderer = TemplateRenderer("{{ messages | tojson }}{{ tools }}{{ bos_token }}", {"bos_token": "<s>"})
    message = {"role": "user", "content": "é\ud800\x00🙂</b>", "n": 1.5, "none": None, "list": [True, {"k": "v"}]}
    rendering = renderer.render(Request([message]))
    assert isinstance(rendering, Rendering)
    expected = (
        '[{"role": "user", "content": "é\ud800\\u0000🙂</b>", "n": 1.5, "none": null, "list": [true, {"k": "v"}]}]'
    )
    assert rendering.text == expected + "None<s>"


def test_a_row_with_much_text_is_no_hostile_row() -> None:
    renderer = TemplateRenderer("{% for m in messages %}{{ m.content | trim | replace('a', 'b') }}{% endfor %}", {})
    messages = [{"role": "user", "content": "a" * (4 << 20)}]
    rendering = renderer.render(Request(messages, cuts=[(1, True)]))
    assert isinstance(rendering, Rendering) and rendering.cuts == ((4 << 20, 4 << 20),)


def test_a_conversation_of_hundreds_of_turns_is_no_hostile_row(tmp_path: Path) -> None:
    template = template_of(tmp_path, CHATML)
    turns = [Turn(role, "the end") for _ in range(200) for role in ("user", "assistant")]
    encoded = template.encode(Record(tuple(turns), "rows.jsonl:1"))
    assert encoded.problems == ()
    assert sum(encoded.mask) == 200 * len(template.tokenizer.encode("the end<|im_end|>"))


def test_a_refusal_holds_the_words_of_the_template() -> None:
    renderer = TemplateRenderer("{{ raise_exception('roles must alternate') }}", {})
    assert renderer.render(Request([{"role": "user", "content": "hi"}])) == Refusal("roles must alternate")
    assert REFUSED == "refused"


def test_the_environment_does_not_reach_the_template(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    renderer = TemplateRenderer("{{ messages[0].content }}", {})
    renderer.render(Request([{"role": "user", "content": "hi"}]))
    surroundings = Path(f"/proc/{renderer._child.process.pid}/environ")
    if not surroundings.exists():
        pytest.skip("this system does not show a process's environment")
    names = {entry.split(b"=")[0].decode() for entry in surroundings.read_bytes().split(b"\0") if entry}
    assert names <= {"LC_ALL", "PATH", "PYTHONUTF8", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH"}
