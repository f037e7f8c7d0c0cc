"""`eval` measures a run beside its base, on its own rows and on others."""

import json

import pytest

from little_run import write_rows
from lorafit.api.merge import merge
from lorafit.api.ship.eval import eval as evaluate
from lorafit.errors import DataError, UsageError
from lorafit.evaluate import exact_match


@pytest.fixture(scope="module")
def evaluated(tiny_run):
    return evaluate(tiny_run.run.path)


def test_the_loss_is_the_one_that_training_reports_on_the_same_rows(tiny_run, evaluated):
    metrics = evaluated.evaluation.tuned.metrics
    assert len(evaluated.evaluation.tuned.rows) == len(tiny_run.held_out_rows)
    assert metrics["loss"].mean == pytest.approx(tiny_run.eval_loss, abs=2e-3)
    assert metrics["loss"].low < metrics["loss"].mean < metrics["loss"].high


def test_tuned_is_better_than_its_base_and_the_base_is_the_base(tiny_run, evaluated):
    from lorafit.methods import method_of

    assert evaluated.evaluation.differences["loss"].verdict == "better"
    with method_of(tiny_run.resolved.config).without(tiny_run.model):
        expected = exact_match(tiny_run.model, tiny_run.held_out_rows, tiny_run.template)
    answers = [row.reply.answer for row in evaluated.evaluation.other.rows]
    assert answers == [sample.answer for sample in expected.samples]


def test_rows_of_a_file_are_read_as_in_training_and_written_down(tiny_run, tmp_path):
    rows = write_rows(tmp_path / "test.jsonl", 12, seed=5)
    length = {"length": lambda expected, answer: float(len(expected) == len(answer))}
    found = evaluate(tiny_run.run.path, rows, limit=6, metrics=length, out=tmp_path / "kept")
    lines = [json.loads(line) for line in (tmp_path / "kept" / "answers.jsonl").read_text().splitlines()]
    assert [line["source"].rpartition("/")[2] for line in lines] == [f"test.jsonl:{number}" for number in range(1, 7)]
    assert {"tuned", "base", "expected", "messages"} <= lines[0].keys()
    assert json.loads((tmp_path / "kept" / "evaluation.json").read_text()) == found.to_dict() | {
        "folder": str(found.folder)
    }
    assert "length" in found.evaluation.tuned.metrics
    assert found.notes[0] == "the first 6 of 12 rows; --limit takes more"
    with pytest.raises(UsageError, match="something is there already"):
        evaluate(tiny_run.run.path, rows, out=tmp_path / "kept")


def test_a_merged_model_is_compared_with_the_run_on_named_rows(tiny_run, tmp_path):
    merged = merge(tiny_run.run.path, onto="quantized", out=tmp_path / "merged").folder
    with pytest.raises(UsageError, match="a merged model keeps no rows"):
        evaluate(merged)
    rows = write_rows(tmp_path / "test.jsonl", 8, seed=6)
    found = evaluate(merged, rows, against=tiny_run.run.path)
    assert found.evaluation.other.name == "run"
    assert abs(found.evaluation.differences["loss"].estimate.mean) < 0.02
    assert found.evaluation.differences["exact_match"].verdict == "no difference shown"


def test_a_metric_under_its_least_value_fails_and_an_unknown_one_is_refused(tiny_run, evaluated):
    loss = evaluated.evaluation.tuned.metrics["loss"].mean
    found = evaluate(tiny_run.run.path, limit=4, least={"loss": loss / 2, "token_f1": 0.0})
    assert not found.passed and list(found.below) == ["loss"]
    with pytest.raises(UsageError, match="no metric 'accuracy' on these rows; name one of loss, exact_match"):
        evaluate(tiny_run.run.path, limit=4, least={"accuracy": 0.5})


def test_rows_that_cannot_be_read_stop_it_with_their_place(tiny_run, tmp_path):
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"instruction": "a", "response": "b"}\n{"instruction": \n')
    with pytest.raises(DataError, match=r"broken\.jsonl:2"):
        evaluate(tiny_run.run.path, broken)
    with pytest.raises(UsageError, match="this is a run directory, not rows"):
        evaluate(tiny_run.run.path, tiny_run.run.path)


def test_long_answers_are_cut_and_said_so(tiny_run):
    found = evaluate(tiny_run.run.path, limit=4, max_new_tokens=1)
    assert found.evaluation.cut and any("cut at 1 tokens" in note for note in found.notes)
