"""Observations on a row's text: each code has rows that show it and rows that only look like it."""

import pytest

from lorafit.data.checks.rows import marker_styles, text_checks
from lorafit.data.schema.records import Record, Turn


def record(*turns: tuple[str, str], system: str | None = None) -> Record:
    return Record(tuple(Turn(role, content) for role, content in turns), "x:1", system)


def pair(asked: str, answered: str) -> Record:
    return record(("user", asked), ("assistant", answered))


def codes(of: Record) -> list[str]:
    return [code for code, _ in text_checks(of)]


def test_a_clean_row_has_no_judgement() -> None:
    assert codes(pair("What is 2 < 3?\n\tIs it # true?", "Größer, naïve, 日本, “quoted” — yes 🙂")) == []


@pytest.mark.parametrize("answered", ["", "  ", "\n\t\n", "\u00a0"])
def test_an_empty_response_is_d013(answered: str) -> None:
    assert codes(pair("a", answered)) == ["D013"]


def test_a_tool_call_without_text_is_no_empty_response() -> None:
    turns = (Turn("user", "a"), Turn("assistant", "", {"tool_calls": [{}]}))
    assert codes(Record(turns, "x:1")) == []


def test_an_empty_prompt_is_d014() -> None:
    assert codes(pair(" ", "b")) == ["D014"]


def test_a_response_equal_to_its_prompt_is_d015() -> None:
    assert codes(pair("say it ", "say it")) == ["D015"]


@pytest.mark.parametrize(
    ("roles", "expected"),
    [
        (["user", "assistant", "user", "assistant"], []),
        (["user", "assistant", "tool", "assistant"], []),
        (["user", "user", "assistant"], ["D017"]),
        (["user", "assistant", "assistant"], ["D017"]),
        (["user", "assistant", "system", "user", "assistant"], ["D017"]),
        (["assistant", "user", "assistant"], ["D018"]),
        (["assistant"], ["D018"]),
        (["user", "assistant", "user"], ["D019"]),
    ],
)
def test_the_order_of_roles(roles: list[str], expected: list[str]) -> None:
    assert codes(record(*[(role, f"text {place}") for place, role in enumerate(roles)])) == expected


@pytest.mark.parametrize(
    ("text", "style"),
    [
        ("### Instruction:\nDo it", "### Instruction:"),
        ("a\n### Response:\nb", "### Instruction:"),
        ("<|user|>\nhi", "<|user|>"),
        ("[INST] hi [/INST]", "[INST]"),
        ("<|im_start|>user", "<|im_start|>"),
        ("<|start_header_id|>user", "<|start_header_id|>"),
        ("<start_of_turn>user", "<start_of_turn>"),
    ],
)
def test_template_markers_are_d040(text: str, style: str) -> None:
    assert codes(pair(text, "b")) == ["D040"]
    assert codes(pair("a", text)) == ["D040"]
    assert marker_styles(pair(text, "b")) == [style]


def test_markers_in_the_system_text_are_seen_too() -> None:
    assert codes(record(("user", "a"), ("assistant", "b"), system="[INST] <<SYS>>")) == ["D040"]


@pytest.mark.parametrize("text", ["### A heading", "a <| b |> c", "instructions: INST", "list[int]"])
def test_what_only_looks_like_a_marker_is_none(text: str) -> None:
    assert codes(pair(text, "b")) == []


@pytest.mark.parametrize("char", ["\0", "\x07", "\x1b", "\x0b", "\x7f"])
def test_control_characters_are_d041(char: str) -> None:
    assert codes(pair(f"a{char}b", "c")) == ["D041"]


@pytest.mark.parametrize("text", ["cafÃ©", "itâ€™s", "5Â\u00a0kg", "\ufffd", "ï»¿x", "a\u0085b"])
def test_mojibake_is_d042(text: str) -> None:
    assert codes(pair(text, "c")) == ["D042"]


@pytest.mark.parametrize("text", ["NÃO", "CHÂTEAU", "Âge", "SÃO PAULO"])
def test_capital_letters_with_accents_are_no_mojibake(text: str) -> None:
    assert codes(pair(text, "c")) == []


def test_half_a_surrogate_pair_is_d043() -> None:
    assert codes(pair("\ud800", "b")) == ["D043"]


SECRETS = [
    "AKIA" + "A1B2C3D4E5F6G7H8",
    "sk-" + "proj-aB3dE6gH9jK2mN5pQ8sT1",
    "ghp_" + "a1B2" * 9,
    "hf_" + "aBcD" * 9,
    "xoxb-" + "123456789012-abcdef",
    "AIza" + "a1B2c" * 7,
    "-----BEGIN RSA PRIVATE KEY-----",
    "glpat-" + "aB3dE6gH9jK2mN5pQ8sT",
    "npm_" + "a1B2" * 9,
    "eyJ" + "hbGciOiJIUzI1NiJ9" + ".eyJ" + "zdWIiOiIxMjM0In0" + ".c2lnbmF0dXJl",
]


@pytest.mark.parametrize("secret", SECRETS, ids=lambda secret: secret[:5])
def test_what_looks_like_a_secret_is_d044_and_is_not_repeated(secret: str) -> None:
    observations = list(text_checks(pair(f"my key is {secret} ok?", "no")))
    assert [code for code, _ in observations] == ["D044"]
    assert secret not in observations[0][1]


@pytest.mark.parametrize("text", ["sk-learn-is-a-library-for-machine-learning", "task-AKIA", "hf_hub", "eyJ."])
def test_ordinary_words_are_no_secrets(text: str) -> None:
    assert codes(pair(text, "b")) == []
