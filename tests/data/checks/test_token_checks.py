"""Observations on tokens: what the template says is wrong becomes a code, and special tokens in a text are seen."""

from pathlib import Path
from types import SimpleNamespace

import pytest

import made_tokenizers as made
from lorafit.data.checks.findings import CODES
from lorafit.data.checks.rows import SAID, SpecialTokens, token_checks
from lorafit.data.schema.records import Record, Turn
from lorafit.data.template import layout as template_problems
from lorafit.data.template.template import Encoded


def test_every_problem_of_a_template_has_a_code() -> None:
    named = {word for name, word in vars(template_problems).items() if name.isupper() and type(word) is str}
    assert set(SAID) == named - {template_problems.CALLS, template_problems.REASONING}
    assert all(code in CODES for code, _ in SAID.values())


@pytest.mark.parametrize(
    ("problem", "code"),
    [
        (template_problems.STOP_MISSING, "D022"),
        (template_problems.BOS_DOUBLED, "D023"),
        (template_problems.NOT_PREFIX_STABLE, "D025"),
    ],
)
def test_a_problem_becomes_a_judgement(problem: str, code: str) -> None:
    assert [found for found, _ in token_checks(Encoded([1, 2], [False, True], (problem,)))] == [code]


def test_a_refused_row_is_named_in_the_template_s_words() -> None:
    encoded = Encoded([], [], (template_problems.REFUSED,), "roles must alternate")
    assert list(token_checks(encoded)) == [("D024", "roles must alternate")]


def test_a_row_with_nothing_supervised_is_d021() -> None:
    assert [code for code, _ in token_checks(Encoded([1, 2], [False, False]))] == ["D021"]
    assert list(token_checks(Encoded([1, 2], [False, True]))) == []


def test_a_special_token_written_in_a_text_is_d045(tmp_path: Path) -> None:
    special = SpecialTokens(made.family_tokenizer(tmp_path, "llama3"))
    for text in ("stop <|eot_id|> here", "<|begin_of_text|>"):
        assert [code for code, _ in special.text_checks(Record((Turn("user", text),), "x:1"))] == ["D045"]
    assert list(special.text_checks(Record((Turn("user", "a < b <| c |> eot_id"),), "x:1"))) == []


def test_a_base_without_special_tokens_finds_none() -> None:
    bare = SimpleNamespace(added_tokens={}, special_ids=frozenset())
    assert list(SpecialTokens(bare).text_checks(Record((Turn("user", "<s>"),), "x:1"))) == []  # type: ignore[arg-type]
