"""Preference data: the command of the error, executed as printed, writes the better answer of each row."""

from pathlib import Path
from typing import Any

import pytest

import made_data as made
from lorafit.errors import DataError

Row = dict[str, Any]
ASK = {"role": "user", "content": "ask"}
TURNS = {"context": [ASK, {"role": "assistant", "content": "x"}, ASK]}


def shp(a: int, b: int) -> Row:
    beside = {"post_id": "x1", "domain": "askculinary_train", "upvote_ratio": 0.98, "score_ratio": 2.0}
    return {**beside, "history": "ask", "human_ref_A": "a", "human_ref_B": "b", "labels": int(a > b), "score_A": a,
            "score_B": b, "created_at_utc_A": 9, "created_at_utc_B": 8, "seconds_difference": 1.0}  # fmt: skip


def webgpt(a: float, b: float) -> Row:
    question = {"dataset": "eli5", "id": "1", "full_text": "ask"}
    quotes = {"title": ["t"], "extract": ["e"]}
    return {"question": question, "quotes_0": quotes, "answer_0": "a", "tokens_0": {"prefix": [1]}, "score_0": a,
            "quotes_1": quotes, "answer_1": "b", "tokens_1": {"prefix": [1]}, "score_1": b}  # fmt: skip


def ultra(*scores: float) -> Row:
    rated = [{"model": "m", "response": text, "overall_score": n} for text, n in zip("abc", scores, strict=False)]
    return {
        "source": "x",
        "instruction": "ask",
        "models": ["m", "n"],
        "completions": rated,
        "correct_answers": ["None"],
    }


def summaries(choice: int) -> Row:
    texts = [{"text": "a", "policy": "p", "note": None}, {"text": "b", "policy": "q", "note": None}]
    return {"info": {"id": "1", "post": "ask", "title": None}, "summaries": texts, "choice": choice, "worker": "w"}


def pair(**more: Any) -> Row:
    return {"prompt": "ask", "response_1": "a", "response_2": "b", **more}


SETS: dict[str, tuple[list[Row], str]] = {
    "SHP": ([shp(9, 2), shp(2, 9), shp(3, 3)], "ab"),
    "WebGPT": ([webgpt(-0.5, 0.5), webgpt(0.0, 0.0), webgpt(1.0, -1.0)], "ba"),
    "HelpSteer2": ([pair(preference_strength=n) for n in (-2, 3, 0, 1)], "abb"),
    "HelpSteer3": ([{**TURNS, "response1": "a", "response2": "b", "overall_preference": n} for n in (1, 2)], "bb"),
    "signs of a verdict": ([pair(preference=n) for n in (-1, 1)], "ab"),
    "one-hot": (
        [pair(winner_model_1=a, winner_model_2=b, winner_tie=t) for a, b, t in ((1, 0, 0), (0, 0, 1), (0, 1, 0))], "ab"
    ),
    "flags": ([pair(response_1_chosen=one, response_2_chosen=not one) for one in (True, False)], "ab"),
    "ranks": ([pair(rank_1=1, rank_2=2), pair(rank_1=2, rank_2=1)], "ab"),
    "unrated": ([pair(rating_1=1, rating_2=2), pair(rating_1=None, rating_2=1)], "b"),
    "UltraFeedback": ([ultra(7.5, 8.5, 1.0), ultra(9.0, 8.5, 9.0), ultra(9.0, 8.0)], "ba"),
    "lists": ([{"input": "ask", "generations": ["a", "b"], "ratings": n} for n in ([5, 1], [1, 5], [2, 2])], "ab"),
    "Nectar": (
        [{"prompt": "ask", "answers": [{"answer": x, "rank": n} for x, n in zip("ab", ns, strict=True)]}
         for ns in ((1, 2), (2, 1))], "ab",
    ),
    "marks": ([{"question": "ask", "responses": ["a", "b"], "correct": n} for n in ([True, 0], [0, 0])], "a"),
    "arena": ([pair(winner=word) for word in ("model_1", "tie (bothbad)", "model_2")], "ab"),
    "summaries": ([summaries(1), summaries(0)], "ba"),
    "one row of summaries": ([summaries(0)], "a"),
}  # fmt: skip


@pytest.mark.parametrize("case", SETS)
def test_the_command_writes_the_better_answer_of_each_row(tmp_path: Path, case: str) -> None:
    rows, better = SETS[case]
    with pytest.raises(DataError, match="preference data") as caught:
        made.spoken(made.write(tmp_path / "rows.in.jsonl", rows))
    assert made.run_fix(str(caught.value.fix), tmp_path) == {}
    told = made.spoken(tmp_path / "rows.jsonl")
    assert "".join(row[-1][1] for row in told) == better
    assert {row[-2] for row in told} == {("user", "ask")}


def test_the_command_reads_numbers_that_csv_has_as_texts(tmp_path: Path) -> None:
    path = made.write(tmp_path / "a.csv", b"question,answer_a,answer_b,score_a,score_b\nask,a,b,9,10\nask,a,b,,1\n")
    with pytest.raises(DataError, match="judged in 'score_a'") as caught:
        made.spoken(path)
    made.run_fix(str(caught.value.fix), tmp_path)
    assert made.spoken(tmp_path / "rows.jsonl") == [[("user", "ask"), ("assistant", "b")]]


@pytest.mark.parametrize(
    ("worse", "better"),
    [
        ({"score_1": 1, "score_2": 2}, {"score_1": 2, "score_2": 2}),
        ({"rank_1": 2, "rank_2": 1}, {"rank_1": 1, "rank_2": 2}),
        ({"preference_strength": 2}, {"preference_strength": -2}),
        ({"winner": "2"}, {"winner": "1"}),
    ],
)
@pytest.mark.parametrize("name", ["response_1", "response"])
def test_a_row_whose_chosen_answer_is_the_worse_one_is_rejected(
    tmp_path: Path, worse: Row, better: Row, name: str
) -> None:
    rows = [{"prompt": "ask", name: text, "response_2": "b", **more} for text, more in (("a", worse), ("c", better))]
    result = made.prepared(
        made.write(tmp_path / "a.jsonl", rows), holdout=0.0, on_bad="drop", field_map={"response": name}
    )
    assert made.found(result, "D038").count == 1
    assert "prefers another answer" in made.found(result, "D038").message
    assert [result.train.record(place).turns[-1].content for place in range(len(result.train))] == ["c"]


def test_an_answer_that_is_not_correct_is_rejected(tmp_path: Path) -> None:
    rows = [{"prompt": "ask", "completion": str(right), "is_correct": right} for right in (True, False)]
    result = made.prepared(made.write(tmp_path / "a.jsonl", rows), holdout=0.0, on_bad="drop")
    assert made.found(result, "D038").count == 1


def test_the_command_keeps_the_rows_that_are_rated_well(tmp_path: Path) -> None:
    rows = [{"prompt": f"ask {n}", "completion": f"say {n}", "quality_score": n} for n in (None, 1, 5)]
    fix = made.found(made.prepared(made.write(tmp_path / "a.jsonl", rows), holdout=0.0), "D037").fix
    made.run_fix(fix.replace(">= N", ">= 3"), tmp_path)
    assert [row[-1][1] for row in made.spoken(tmp_path / "rows.jsonl")] == ["say 5"]
