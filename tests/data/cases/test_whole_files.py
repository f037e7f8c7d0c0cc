"""A named template, what is said of whole files, and what `--fix` writes."""

import json
from pathlib import Path
from typing import Any

import pytest

import made_data as made
import made_tokenizers
from lorafit.config import resolve
from lorafit.data import Prepared, Template, fix_rows
from lorafit.data.template.template import FILE
from lorafit.data.tokenizer.tokenizer import TextTokenizer
from lorafit.errors import DataError, LorafitError, TemplateError
from template_shapes import CHATML, base_folder, template_of


def rows_of(result: Prepared) -> list[tuple[str, ...]]:
    """What each row asks and answers."""
    return [tuple(turn.content for turn in result.train.record(place).turns) for place in range(len(result.train))]


def split_folder(tmp_path: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        made.write(tmp_path / name, [made.row(number)])
    return tmp_path


def test_a_named_template_is_stored_with_the_run_and_read_again(tmp_path: Path) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text(CHATML)
    tokenizer = TextTokenizer.from_folder(base_folder(tmp_path, "phi4"))
    template = Template.for_tokenizer(tokenizer, str(file))
    template.save(tmp_path / "template.json")
    file.unlink()
    again = Template.load(tmp_path / "template.json", tokenizer)
    asked = [{"role": "user", "content": "Hi"}]
    assert (again.name, again.source, again.jinja_for_export) == (FILE, CHATML, CHATML)
    assert (
        again.prompt_text(asked)
        == template.prompt_text(asked)
        == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    with pytest.raises(TemplateError, match="cannot be read"):
        Template.for_tokenizer(tokenizer, str(file))


def test_a_token_that_no_golden_prompt_holds_may_not_change_after_training(tmp_path: Path) -> None:
    folder = base_folder(tmp_path, "chatml")
    saved = tmp_path / "template.json"
    Template.for_tokenizer(TextTokenizer.from_folder(folder)).save(saved)
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"truncation": None, "version": "1.0"}, indent=4))
    Template.load(saved, TextTokenizer.from_folder(folder))
    vocabulary = content["model"]["vocab"]
    first, last = sorted(vocabulary, key=vocabulary.__getitem__)[-2:]
    vocabulary[first], vocabulary[last] = vocabulary[last], vocabulary[first]
    path.write_text(json.dumps(content))
    with pytest.raises(TemplateError, match="a token of the base's tokenizer has changed"):
        Template.load(saved, TextTokenizer.from_folder(folder))


def test_naming_a_template_mends_a_row_whose_text_the_base_leaves_out(tmp_path: Path) -> None:
    turns = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "CALL"},
        {"role": "tool", "content": "21 C"},
    ]
    path = made.write(tmp_path / "rows.jsonl", [{"messages": [*turns, {"role": "assistant", "content": "21 C"}]}])
    tokenizer = TextTokenizer.from_folder(base_folder(tmp_path, "phi4"))
    fault = made.found(made.prepared(path, Template.for_tokenizer(tokenizer), holdout=0.0), "D039")
    assert "--set template=FILE" in fault.fix and "--ignore D039" in fault.fix
    (tmp_path / "mine.jinja").write_text(CHATML)
    mended = made.prepared(path, Template.for_tokenizer(tokenizer, str(tmp_path / "mine.jinja")), holdout=0.0)
    assert "D039" not in made.codes(mended) and len(mended.train) == 1
    ignored = made.prepared(path, Template.for_tokenizer(tokenizer), holdout=0.0, ignore=["D039"])
    assert len(ignored.train) == 1


def test_an_id_without_an_embedding_is_one_error(tmp_path: Path) -> None:
    base = made_tokenizers.family_folder(tmp_path / "base", "qwen2_5")
    template = Template.for_tokenizer(TextTokenizer.from_folder(base))
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}]
    path = made.write(tmp_path / "rows.jsonl", rows)
    last = max(template.tokenizer.added_tokens)
    (base / "config.json").write_text(json.dumps({"model_type": "qwen2", "vocab_size": last}))
    fault = made.found(made.prepared(path, template, base=str(base), holdout=0.0), "D048")
    assert f"the id {last:,}, and the base's embedding table has {last:,} rows" in fault.message
    assert (fault.severity, fault.where, fault.count) == ("error", f"{path}:1", 2)
    (base / "config.json").write_text(json.dumps({"model_type": "qwen2", "vocab_size": last + 1}))
    assert "D048" not in made.codes(made.prepared(path, template, base=str(base), holdout=0.0))


def test_one_system_text_in_all_rows_is_said_with_the_way_to_serve_it(tmp_path: Path) -> None:
    rows = [{**made.row(number), "system": "Be brief."} for number in range(3)]
    result = made.prepared(made.write(tmp_path / "a.jsonl", rows), holdout=0.0)
    assert "“Be brief.”" in made.found(result, "D049").message and "chat RUN --system" in made.found(result, "D049").fix
    mixed = made.prepared(made.write(tmp_path / "b.jsonl", [*rows, made.row(9)]), holdout=0.0)
    assert "D049" not in made.codes(mixed)


def test_placeholders_are_told_when_more_than_one_row_in_a_hundred_has_one(tmp_path: Path) -> None:
    rows = [made.row(number) for number in range(200)]
    few = made.prepared(made.write(tmp_path / "a.jsonl", [*rows, made.row(900, response="N/A")]), holdout=0.0)
    assert "D046" not in made.codes(few)
    many = [made.row(900 + number, response=text) for number, text in enumerate(("N/A", "TODO", "(see above)"))]
    assert made.found(made.prepared(made.write(tmp_path / "b.jsonl", [*rows, *many]), holdout=0.0), "D046").count == 3


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a<br>b", True),
        ("x &nbsp; y", True),
        ("<p>a</p>", True),
        ("a < b && c > d", False),
        ("```\n<p>a</p>\n```", False),
    ],
)
def test_html_left_in_a_text_is_told(tmp_path: Path, text: str, told: bool) -> None:
    result = made.prepared(made.write(tmp_path / "a.jsonl", [made.row(1, response=text)]), holdout=0.0)
    assert ("D047" in made.codes(result)) is told


def fixed(tmp_path: Path, rows: Any, **settings: Any) -> Path:
    path = made.write(tmp_path / "in.jsonl", rows)
    fix_rows(resolve({}, {"data": str(path), **settings}).config, tmp_path / "out.jsonl")
    return tmp_path / "out.jsonl"


def test_fix_applies_the_map_and_writes_what_check_calls_clean(tmp_path: Path) -> None:
    rows = [{"q": f"ask {n}  ", "a": f"say {n}", "answer": "other"} for n in range(3)]
    bad = [{"q": "x", "a": ""}, {"q": "x", "a": None}, {"q": "x", "a": 5}]
    out = fixed(tmp_path, [*rows, *bad], map={"prompt": "q", "response": "a"})
    result = made.prepared(out, holdout=0.0)
    assert rows_of(result)[0] == ("ask 0", "say 0")
    assert (len(result.train), result.summary.rejected, [f for f in result.findings if f.severity != "info"]) == (
        3,
        0,
        [],
    )


def test_fix_leaves_the_indentation_of_code(tmp_path: Path) -> None:
    out = fixed(tmp_path, [{"prompt": "def f(x):\n", "completion": "    return x\n"}])
    assert json.loads(out.read_text()) == {"prompt": "def f(x):", "completion": "    return x"}


def test_fix_does_not_mix_splits(tmp_path: Path) -> None:
    folder = split_folder(tmp_path / "data", "train.jsonl", "test.jsonl")
    with pytest.raises(LorafitError, match="not to be mixed"):
        fix_rows(resolve({}, {"data": str(folder)}).config, tmp_path / "out.jsonl")


def test_documents_are_told_apart_by_their_own_text(tmp_path: Path) -> None:
    rows = [{"text": " ".join(f"w{n}x{place}" for place in range(12))} for n in range(30)]
    template = template_of(tmp_path, "chatml")
    result = made.prepared(made.write(tmp_path / "a.jsonl", rows), template, map={"text": "text"})
    assert made.codes(result) == set() and len(result.holdout) > 0
    with pytest.raises(DataError, match="--map text=text"):
        made.prepared(made.write(tmp_path / "b.jsonl", rows))
