"""`lorafit eval` on the screen and as JSON."""

import json

import pytest

from lorafit.cli.app import main


def run(capsys, *words):
    with pytest.raises(SystemExit) as ended:
        main(["eval", *map(str, words)])
    return ended.value.code, capsys.readouterr()


def test_the_table_compares_base_and_tuned_and_names_wrong_rows(tiny_run, capsys):
    code, shown = run(capsys, tiny_run.run.path, "--limit", 5)
    assert code == 0
    assert "held-out rows of the run" in shown.out and "difference (95 %)" in shown.out
    assert "better" in shown.out and "tickets.jsonl:" in shown.out
    assert f"lorafit eval {tiny_run.run.path} --out evaluation" in shown.out


def test_a_missed_least_value_ends_with_1_and_json_says_so(tiny_run, capsys):
    code, shown = run(capsys, tiny_run.run.path, "--limit", 5, "--least", "exact_match=1.01", "--json")
    answer = json.loads(shown.out)
    assert code == 1 and answer["passed"] is False
    assert answer["below"]["exact_match"]["least"] == 1.01
    assert set(answer["metrics"]) == {"base", "tuned"} and answer["rows"] == 5


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--least", "exact_match"], "is no metric with a number"),
        (["--least", "loss=low"], "write it as exact_match=0.9"),
        (["missing.jsonl"], "missing.jsonl"),
        (["--against", "no-such-run"], "no such folder"),
    ],
)
def test_wrong_words_are_one_sentence(tiny_run, capsys, words, sentence):
    code, shown = run(capsys, tiny_run.run.path, *words)
    assert code in (1, 2) and sentence in shown.err and "Traceback" not in shown.err
