# ruff: noqa: E501
"""Each data finding's fix, done as it is written: by the command line where it is a command, else by the change it names."""

import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import made_data as made
import made_tokenizers
from lorafit.cli import main
from lorafit.data.checks.findings import CODES
from template_shapes import CHATML, base_folder

Rows = bytes | list[dict[str, Any]]
PAIR = {"prompt": "ask", "completion": "say"}
USER, SAY = {"role": "user", "content": "ask"}, {"role": "assistant", "content": "say"}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Lima"}}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
SHOWS_TOOLS = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.reasoning_content or '' }}{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments | tojson }}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{{ '' if enable_thinking else '' }}{% endif %}"
)


ENDS_WITH_EOS = (
    "{% for m in messages %}{{ '[' + m.role + ']\n' + m.content + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]\n' }}{% endif %}"
)
BOS_AND_TEXT = (
    "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>assistant\n' + m.content + '<|im_end|>\n' if m.role == 'assistant' else m.content + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass
class Fault:
    """One file at fault, and how its fix is done.

    Attributes:
        rows: what the file holds.
        flags: parts of the fix that are flags; capital words in them stand for `values`.
        says: words of the fix that ask for the change to `mended`.
        fixes: whether the fix is `lorafit check --fix`.
        shape: the shape of the base's chat template; none is needed without one.
        given: flags of the first command.
    """

    rows: Rows
    flags: tuple[str, ...] = ()
    says: str = ""
    mended: Rows = b""
    fixes: bool = False
    shape: str = ""
    name: str = "rows.jsonl"
    given: str = ""
    values: dict[str, str] = field(default_factory=dict)
    template: str = ENDS_WITH_EOS


def talk(*contents: str) -> dict[str, Any]:
    return {"messages": [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(contents)]}


def many(count: int, **more: Any) -> list[dict[str, Any]]:
    return [made.row(number, **more) for number in range(count)]


LINE = made.jsonl([PAIR])
LONG = " ".join(f"w{n}" for n in range(60))
FAULTS: dict[str, Fault] = {
    "D001": Fault(LINE + b'{"prompt": "a", "completion": "b",}\n', says="mend the line", mended=LINE + b'{"prompt": "a", "completion": "b"}\n'),
    "D001 set aside": Fault(LINE + b'{"prompt": "a"', fixes=True),
    "D002": Fault(LINE + b'[1]\n', says="one {...} object per row", mended=LINE),
    "D003": Fault(LINE + b'{"prompt": "a", "completion": "b", "completion": "c"}\n', says="keep one of the two", mended=LINE + b'{"prompt": "a", "completion": "c"}\n'),
    "D004": Fault(made.jsonl([{"prompt": "Grüße?", "completion": "ja"}]).decode().encode("cp1252"), ("--set encoding=cp1252",)),
    "D005": Fault(b'{"prompt": "a\x07b", "completion": "c"}\n', fixes=True),
    "D006": Fault(json.dumps({**PAIR, "prompt": "x" * (17 << 20)}).encode(), says="line ends", mended=LINE),
    "D007": Fault(LINE + b'{"prompt": ' + b"[" * 70 + b"]" * 70 + b', "completion": "b"}\n', says="flatten", mended=LINE),
    "D008": Fault(b"prompt,completion\na, b,c\nd,e\n", says="quote cells", mended=b'prompt,completion\n"a, b",c\nd,e\n', name="rows.csv"),
    "D009": Fault(b"\xef\xbb\xbf" + LINE, fixes=True),
    "D010": Fault([{"prompt": "ask", "reply": "say"}] * 2 + [PAIR], says="name it with --map", mended=[{"prompt": "ask", "completion": "say"}] * 3),
    "D011": Fault([PAIR, {"prompt": "ask", "completion": None}], says="fill it in", mended=[PAIR, {"prompt": "asks", "completion": "said"}]),
    "D012": Fault([PAIR, {"prompt": "ask", "completion": 4}], says="write it as text", mended=[PAIR, {"prompt": "asks", "completion": "4"}]),
    "D013": Fault([PAIR, {"prompt": "asks", "completion": " "}], says="fill it in", mended=[PAIR, {"prompt": "asks", "completion": "said"}]),
    "D014": Fault([{"prompt": "", "completion": "say"}], says="fill the prompt in", mended=[PAIR]),
    "D015": Fault([{"prompt": "a b c", "completion": "a b c"}], says="how the rows were made", mended=[PAIR]),
    "D016": Fault([talk("a", "b"), talk("c")], says="add the answer", mended=[talk("a", "b"), talk("c", "d")]),
    "D016 beside": Fault([{"messages": [USER], "output": "say"}], ("--map prompt=messages",)),
    "D017": Fault([{"messages": [USER, {**USER, "content": "more"}, SAY]}], says="alternate user and assistant", mended=[talk("ask\nmore", "say")]),
    "D018": Fault([{"messages": [SAY, USER, {**SAY, "content": "b"}]}], says="start with the user", mended=[talk("ask", "b")]),
    "D019": Fault([talk("a", "b", "c")], says="end with the assistant", mended=[talk("a", "b")]),
    "D020 longer": Fault([PAIR, {"prompt": LONG, "completion": "say"}], ("--set max_length=N",), shape="chatml", given="--set max_length=64", values={"N": "1024"}),
    "D020": Fault([PAIR, {"prompt": LONG, "completion": "say"}], ("--on-long drop",), shape="chatml", given="--set max_length=64"),
    "D020 split": Fault([talk("ask", "say", LONG[:120], "b", LONG[:110], "d")], ("--on-long", "split-turns"), shape="chatml", given="--set max_length=256", values={}),
    "D021": Fault([{"messages": [USER, {**SAY, "weight": 0}]}, talk("c", "d")], says="flag one of its answers", mended=[{"messages": [USER, {**SAY, "weight": 1}]}, talk("c", "d")]),
    "D022": Fault([PAIR], ("--set template=FILE",), shape="glm4"),
    "D023": Fault([{"prompt": "<s>ask", "completion": "say"}], says="take BOS out of the text", mended=[PAIR], shape="bos-and-text", given="--ignore D045"),
    "D024": Fault([{"messages": [{"role": "system", "content": "S"}, USER, SAY]}], ("--set template=FILE",), shape="gemma2"),
    "D025": Fault([talk("a", "<think>\nx\n</think>\n\nb", "c", "d")], ("--set split_answers=true",), shape="qwen3"),
    "D026": Fault([PAIR], ("--set template=FILE",), shape="r1"),
    "D027": Fault([{"messages": [USER, {**SAY, "reasoning": "First."}]}], ("--set template=FILE",), shape="chatml", template=SHOWS_TOOLS),
    "D028": Fault([PAIR], ("--set template=FILE",), shape="qwen35"),
    "D029": Fault([{"messages": [USER, {**SAY, "tool_calls": [CALL]}], "tools": [TOOL]}], ("--set template=FILE",), shape="chatml", template=SHOWS_TOOLS),
    "D030": Fault([*many(5), made.row(0)], fixes=True),
    "D031": Fault([made.row(1, response=LONG), made.row(1, response=LONG + " more")], says="keep one of each", mended=[made.row(1, response=LONG)]),
    "D031 accepted": Fault([made.row(1, response=LONG), made.row(1, response=LONG + " more")], ("--ignore D031",)),
    "D033": Fault([{"prompt": "what is it?", "completion": text} for text in ("one", "two")], says="keep one answer", mended=[{"prompt": "what is it?", "completion": "one"}]),
    "D034": Fault([*many(70), *(made.row(100 + n, response="I do not know that.") for n in range(30))], says="drop some of those rows", mended=many(70)),
    "D035": Fault([{"prompt": "ask", "completion": ""}], says="mend those that were rejected", mended=[PAIR]),
    "D037": Fault([{**PAIR, "lore": "more to know"}], ("--map input=NAME",), values={"NAME": "lore"}),
    "D038": Fault([{**PAIR, "passage": "more to know"}], ("--map input=NAME",), values={"NAME": "passage"}),
    "D038 reasoning": Fault([{**PAIR, "cot": "because"}], ("--map reasoning=NAME",), values={"NAME": "cot"}),
    "D038 answers": Fault([{**PAIR, "answer": "other"}], ("--map response=NAME",), values={"NAME": "answer"}),
    "D038 ignored": Fault([{**PAIR, "passage": "more"}], ("--ignore D038",)),
    "D039": Fault([{"messages": [{"role": "system", "content": "S"}, USER, SAY]}], ("--set template=FILE",), shape="phi3old"),
    "D040": Fault([{"prompt": "### Instruction:\nask", "completion": "say"}], says="store the plain text", mended=[PAIR]),
    "D041": Fault(b'{"prompt": "a\\u0007b", "completion": "c"}\n', fixes=True),
    "D042": Fault([{"prompt": "cafÃ©?", "completion": "ja"}], says="decode the source as UTF-8", mended=[{"prompt": "cafÃ©?".encode("cp1252").decode(), "completion": "ja"}]),
    "D043": Fault(LINE + b'{"prompt": "a \\ud83d", "completion": "b"}\n', says="mend the escape", mended=LINE + b'{"prompt": "a \\ud83d\\ude00", "completion": "b"}\n'),
    "D044": Fault([{"prompt": "key?", "completion": "hf_" + "aB3dE6" * 6}], says="take the secret out", mended=[{"prompt": "key?", "completion": "$HF_TOKEN"}]),
    "D045": Fault([{"prompt": "ask", "completion": "say<|im_end|>"}], says="take it out of the text", mended=[PAIR], shape="chatml"),
    "D046": Fault([{"prompt": "ask", "completion": "TODO"}, PAIR], says="write the answers", mended=[{"prompt": "asks", "completion": "done"}, PAIR]),
    "D047": Fault([{"prompt": "ask", "completion": "one<br>two"}], says="plain text", mended=[{"prompt": "ask", "completion": "one\ntwo"}]),
    "D051": Fault([{"messages": [{**USER, "weight": 1}, SAY]}], says="set it to 0", mended=[{"messages": [{**USER, "weight": 0}, SAY]}]),
    "D053": Fault(b'prompt,completion\n"say \\"hi\\"",4\na,b\n', says='as ""', mended=b'prompt,completion\n"say ""hi""",4\na,b\n', name="rows.csv"),
    "D054": Fault([{**PAIR, "chat_template_kwargs": {"enable_thinking": False}}], ("--set template=FILE",), shape="chatml", template=SHOWS_TOOLS),
    "D055": Fault([{"messages": [USER, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nsay"}]}], says="see check --show", mended=[{"messages": [USER, {**SAY, "thinking": "hm"}]}], shape="harmony"),
    "D056": Fault([{"messages": [USER, {"role": "assistant", "content": "say <think>hm</think> it"}]}], says="reasoning_content", mended=[{"messages": [USER, {**SAY, "reasoning_content": "hm"}]}], shape="harmony"),
    "P5": Fault([*many(20), *(made.row(50 + n, instruction=f"### Instruction:\nask {n}") for n in range(3))], says="strip the markers", mended=many(23)),
}  # fmt: skip
ALONE = {"D032", "D036", "D048", "D050", "D052", "D057"}
"""Codes of files beside the rows, or of the base: each has a test of its own below."""
OF_SERVING = {"D049"}
"""A note about serving, which the command `chat --system` answers."""


def test_every_finding_has_its_fix_done_here() -> None:
    assert {name.split()[0] for name in FAULTS} | ALONE | OF_SERVING == set(CODES)


@pytest.fixture
def check(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, dict[str, dict[str, Any]], str]]:
    """Run `lorafit check`: (exit code, the findings by code, what else was said)."""

    def call(*words: object) -> tuple[int, dict[str, dict[str, Any]], str]:
        with pytest.raises(SystemExit) as ended:
            main(["check", *map(str, words), "--json"])
        out, err = capsys.readouterr()
        found = json.loads(out).get("findings", [])
        return int(ended.value.code or 0), {one["code"]: one for one in found}, out + err

    return call


def configured(base: Path, vocabulary: int) -> Path:
    """The base with a config.json of a small Llama with so many embeddings."""
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 4096,
    }
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": vocabulary, **sizes}
    (base / "config.json").write_text(json.dumps(config))
    return base


def odd_base(home: Path, shape: str) -> Path:
    """A base folder with the chat template of this shape, or with the fault that `shape` names."""
    odd: dict[str, dict[str, Any]] = {
        "glm4": {"template": CHATML.replace("<|im_end|>", ""), "eos_token": "<|e|>"},
        "bos-and-text": {
            "template": BOS_AND_TEXT,
            "bos_token": "<s>",
            "eos_token": "<|im_end|>",
            "extra": ["<|im_start|>"],
        },
    }
    if shape in odd:
        base = made_tokenizers.special_folder(home / shape, made_tokenizers.byte_level(), **odd[shape])
    else:
        base = base_folder(home, shape)
    return configured(base, 4096)


def written(path: Path, rows: Rows) -> Path:
    path.parent.mkdir(exist_ok=True)
    return made.write(path, rows)


@pytest.mark.parametrize("name", FAULTS)
def test_the_fix_done_as_written_mends_it(tmp_path: Path, check: Any, name: str) -> None:
    code, fault = name.split()[0], FAULTS[name]
    path = written(tmp_path / fault.name, fault.rows)
    base = ["--base", odd_base(tmp_path, fault.shape)] if fault.shape else []
    given = shlex.split(fault.given)
    ended, before, said = check(path, *base, *given)
    assert code in before, said
    assert (ended == 1) is (before[code]["severity"] == "error")
    fix = before[code]["fix"]
    words: list[str] = []
    if fault.fixes:
        assert "lorafit check --fix" in fix
        out = tmp_path / "clean.jsonl"
        check(path, *base, "--fix", out)
        path = out
    elif fault.flags:
        assert all(flag in fix for flag in fault.flags), fix
        (tmp_path / "mine.jinja").write_text(fault.template)
        values = {"FILE": str(tmp_path / "mine.jinja"), **fault.values}
        words = [values.get(word, word) for flag in fault.flags for word in shlex.split(flag.replace("=", " = "))]
        words = shlex.split(" ".join(words).replace(" = ", "="))
        given = [] if any(word.startswith("max_length=") for word in words) else given
    else:
        assert fault.says and fault.says in fix, fix
        path = written(path, fault.mended)
    ended, after, said = check(path, *base, *given, *words)
    if code != "D020" or "--on-long" not in words:
        assert code not in after, said
    assert ended == 0, said


def test_d032_is_gone_when_the_row_is_taken_out_of_one_side(tmp_path: Path, check: Any) -> None:
    held = made.write(tmp_path / "held.jsonl", [made.row(9, response=LONG + " more")])
    path = made.write(tmp_path / "rows.jsonl", [*many(4), made.row(9, response=LONG)])
    _, before, _ = check(path, "--holdout", held)
    assert "take it out of one side" in before["D032"]["fix"]
    made.write(path, many(4))
    ended, after, _ = check(path, "--holdout", held)
    assert (ended, "D032" in after) == (0, False)


def test_d036_is_gone_with_a_file_held_out_or_more_rows(tmp_path: Path, check: Any) -> None:
    path, held = made.write(tmp_path / "rows.jsonl", [PAIR]), made.write(tmp_path / "held.jsonl", many(2))
    fix = check(path, "--holdout", "0.5")[1]["D036"]["fix"]
    assert "--holdout FILE" in fix and "add rows" in fix
    assert "D036" not in check(path, "--holdout", held)[1]
    assert "D036" not in check(made.write(path, many(20)), "--holdout", "0.5")[1]


def test_d048_is_gone_without_the_added_token_or_with_a_larger_table(tmp_path: Path, check: Any) -> None:
    base = base_folder(tmp_path, "chatml")
    saved = json.loads((base / "tokenizer.json").read_text())
    last = max(token["id"] for token in saved["added_tokens"])
    entity = {
        "content": "<ent>",
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": False,
    }
    more = {**saved, "added_tokens": [*saved["added_tokens"], {"id": last + 1, **entity}]}
    path = made.write(tmp_path / "rows.jsonl", [{"prompt": "ask", "completion": "<ent> say"}])
    configured(base, last + 1)
    (base / "tokenizer.json").write_text(json.dumps(more))
    ended, before, _ = check(path, "--base", base)
    assert (
        ended == 1 and "take the added token out" in before["D048"]["fix"] and "were resized" in before["D048"]["fix"]
    )
    configured(base, last + 2)
    assert check(path, "--base", base)[0] == 0
    configured(base, last + 1)
    (base / "tokenizer.json").write_text(json.dumps(saved))
    assert check(path, "--base", base)[0] == 0


def test_d050_is_gone_without_the_chat_template(tmp_path: Path, check: Any) -> None:
    base = base_folder(tmp_path, "chatml")
    saved = json.loads((base / "tokenizer.json").read_text())
    special = [token["id"] for token in saved["added_tokens"]]
    table = np.random.default_rng(0).normal(size=(max(special) + 1, 8)).astype("<f4")
    table[special[1:]] = 0  # all but EOS
    header = json.dumps(
        {"model.embed_tokens.weight": {"dtype": "F32", "shape": list(table.shape), "data_offsets": [0, table.nbytes]}}
    ).encode()
    (base / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + table.tobytes())
    configured(base, len(table))
    path = made.write(tmp_path / "rows.jsonl", [PAIR])
    before = check(path, "--base", base)[1]
    assert "take its chat template out" in before["D050"]["fix"]
    config = json.loads((base / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (base / "tokenizer_config.json").write_text(json.dumps(config))
    (base / "chat_template.jinja").unlink(missing_ok=True)
    ended, after, said = check(path, "--base", base)
    assert (ended, "D050" in after) == (0, False), said


def test_d052_is_gone_for_a_file_that_is_named_itself(tmp_path: Path, check: Any) -> None:
    for name in ("train", "test"):
        written(tmp_path / "data" / f"{name}.jsonl", [{**PAIR, "prompt": name}])
    before = check(tmp_path / "data")[1]
    assert "name a file itself" in before["D052"]["fix"]
    ended, after, _ = check(*(tmp_path / "data" / f"{name}.jsonl" for name in ("train", "test")))
    assert (ended, "D052" in after) == (0, False)
