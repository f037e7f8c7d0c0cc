"""Columns beside a conversation: lists of loss flags, `mask_history`, reasoning; the `--map` of what is not read."""

import shlex
from pathlib import Path
from typing import Any

import pytest

import made_data as made
from lorafit.data import parse_rows
from lorafit.errors import DataError

TALK = [
    {"role": "system", "content": "Be brief."},
    *({"role": role, "content": text} for pair in ("ab", "cd") for role, text in zip(("user", "assistant"), pair)),
]
PAIR = {"instruction": "2+2?", "output": "4"}


def taught(**columns: Any) -> list[str]:
    (record,) = parse_rows([{"messages": TALK, **columns}])
    return [turn.content for turn in record.turns if turn.taught]


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"weights": [0, 0, 0, 0, 1]}, ["d"]),
        ({"weights": [0, 1]}, ["d"]),
        ({"weights": "[1, 0]"}, ["b"]),
        ({"loss_mask": [False, False, True, False, False]}, ["b"]),
        ({"train": [1.0, 0.0]}, ["b"]),
        ({"weights": [1, 1, 1, 1, 1]}, ["b", "d"]),
        ({"mask_history": True}, ["d"]),
        ({"mask_history": "true"}, ["d"]),
        ({"mask_history": 0}, ["b", "d"]),
        ({"mask_history": None, "weights": None}, ["b", "d"]),
    ],
)
def test_flags_beside_the_turns_say_what_is_learnt(columns: dict[str, Any], expected: list[str]) -> None:
    assert taught(**columns) == expected


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"weights": [0, 1, 1]}, "'weights' has 3 flags for 5 turns"),
        ({"weights": [0.5, 1]}, "the flags in 'weights' are not all 0, 1"),
        ({"weights": ["0", "1"]}, "the flags in 'weights' are not all 0, 1"),
        ({"mask_history": "perhaps"}, "'mask_history' is a text, not true or false"),
        ({"mask_history": True, "weights": [1, 0]}, "."),
        ({"mask": [0, 1]}, "'mask' seems to hold loss flags"),
        ({"reasoning": "Because."}, "the field 'reasoning' is not used"),
        (
            {"weights": [0, 1], "messages": [*TALK[:2], {**TALK[2], "weight": 1}, *TALK[3:]]},
            "turn 3: its own loss flag",
        ),
    ],
)
def test_flags_that_cannot_be_followed_are_errors(columns: dict[str, Any], says: str) -> None:
    with pytest.raises(DataError, match=says):
        taught(**columns)


def test_flags_beside_a_plain_pair_are_no_reason_to_drop_it_unless_they_say_so() -> None:
    assert parse_rows([{**PAIR, "weights": [1, 1]}])[0].response == "4"
    with pytest.raises(DataError, match="the loss flags in 'weights' are not read"):
        parse_rows([{**PAIR, "weights": [0, 1]}])


def test_mask_history_holds_for_the_rounds_of_a_history() -> None:
    (record,) = parse_rows([{**PAIR, "history": [["1+1?", "2"]], "mask_history": True}])
    assert [turn.content for turn in record.turns if turn.taught] == ["4"]


def test_reasoning_beside_one_answer_is_its_reasoning() -> None:
    (record,) = parse_rows([{"messages": TALK[:3], "thinking": "Think."}])
    assert record.turns[-1].reasoning == "Think."
    (record,) = parse_rows([{"messages": TALK, "weights": [0, 1], "deepseek": "Hm."}], {"reasoning": "deepseek"})
    assert record.turns[-1].reasoning == "Hm." and not record.turns[1].reasoning


def test_a_mapped_column_that_the_shape_does_not_read_is_an_error() -> None:
    with pytest.raises(DataError, match="the field 'lore' is not used in rows of messages"):
        parse_rows([{"messages": TALK, "lore": "x"}], {"input": "lore"})


@pytest.mark.parametrize(
    ("row", "flag"),
    [
        ({**PAIR, "explanation": "Two and two."}, "reasoning=explanation"),
        ({**PAIR, "deepseek_reasoning": "Hm."}, "reasoning=deepseek_reasoning"),
        ({**PAIR, "model_system_text": "Be kind."}, "system=model_system_text"),
        ({"messages": TALK[:3], "explanation": "Because."}, "reasoning=explanation"),
    ],
)
def test_d037_names_the_map_that_uses_the_column(tmp_path: Path, row: dict[str, Any], flag: str) -> None:
    path = made.write(tmp_path / "rows.jsonl", [row])
    fix = made.found(made.prepared(path, holdout=0.0), "D037").fix
    words = shlex.split(fix)
    assert words[words.index("--map") + 1] == flag
    name, column = flag.split("=")
    assert "D037" not in made.codes(made.prepared(path, holdout=0.0, field_map={name: column}))
    (record,) = parse_rows([row], {name: column})
    assert row[column] in (record.system, record.turns[-1].reasoning)


def test_d037_of_messages_names_no_place_that_they_lack(tmp_path: Path) -> None:
    path = made.write(tmp_path / "rows.jsonl", [{"messages": TALK, "topic": "letters"}])
    assert "--map" not in made.found(made.prepared(path, holdout=0.0), "D037").fix
