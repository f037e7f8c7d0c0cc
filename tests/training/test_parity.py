"""The parity bench in its short form: lorafit's losses are its peers' libraries'. The whole: bench/parity.py."""

import ast
import dataclasses
import sys
from pathlib import Path

import pytest
import torch

from lorafit.demo import BASE

BENCH = Path(__file__).parents[2] / "bench"
STEPS, EXAMPLES = 4, 4


@pytest.fixture(scope="module")
def steps(parity, tmp_path_factory):
    """Four steps of lorafit.train, each in more than one micro-batch."""
    return parity.lorafit_steps(
        tmp_path_factory.mktemp("steps"), str(BASE), STEPS, EXAMPLES, seed=0, compute="fp32", lr=5e-3, max_length=192
    )


def curves(parity, steps, rows_per_forward=3, **changed):
    recipe = dataclasses.replace(steps.recipe, **changed)
    theirs = parity.reference.losses(
        str(BASE), steps.rows, steps.adapters[0], recipe, torch.float32, rows_per_forward=rows_per_forward
    )
    return parity.Curves(steps.losses, theirs)


def test_each_steps_loss_is_that_of_transformers_peft_and_bitsandbytes(parity, steps):
    assert len({len(ids) for rows in steps.rows for ids, _ in rows}) > EXAMPLES, "lengths are even: a weak comparison"
    found = curves(parity, steps)
    assert len(found.differences) == STEPS
    assert max(found.differences) < 1e-4 < parity.LOSS_BOUND


def test_so_is_the_loss_at_the_adapters_of_each_step(parity, steps):
    theirs = parity.reference.losses_at(str(BASE), steps.rows, steps.adapters, steps.recipe, torch.float32, EXAMPLES)
    assert max(parity.Curves(steps.losses, theirs).differences) < 1e-5


def test_another_learning_rate_is_beyond_the_bound(parity, steps):
    found = curves(parity, steps, rows_per_forward=EXAMPLES, lr=steps.recipe.lr * 2)
    assert found.differences[0] < 1e-4, "the first step begins with equal adapters"
    assert not found.agree


@pytest.mark.parametrize("lost", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_agrees_with_none(parity, lost):
    assert not parity.Curves([1.0, lost], [1.0, 1.0]).agree
    assert not parity.Curves([lost, 1.0], [1.0, 1.0]).agree
    assert parity.Curves([1.0, 1.0], [1.0, 1.004]).agree


def test_the_reference_imports_nothing_of_lorafit():
    tree = ast.parse((BENCH / "parity_reference.py").read_text())
    imported = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    imported += [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert "peft" in imported
    assert not [name for name in imported if name.split(".")[0] in ("lorafit", "parity")]


@pytest.mark.skipif(torch.cuda.is_available(), reason="FP8 is emulated on a CPU alone")
def test_a_task_trained_in_two_precisions_is_compared_where_it_ends(parity, tmp_path):
    arms = parity.Arm("fp32"), parity.Arm("fp32", (parity.EmulatedFp8(),))
    settings = {"rows": (12, 4), "max_steps": 2, "examples_per_step": 4, "lr": 5e-3}
    exact, fp8 = parity.endings(tmp_path, parity.ENDING_TASKS["dates"], 0, arms, **settings)
    assert exact.kl == 0.0, "it is served in the precision that it was trained in"
    assert exact.served_loss == pytest.approx(exact.trained_loss, rel=1e-5)
    # hardly trained, the base is far from sure of the first answers, and rounding moves it the more
    assert fp8.kl > 1e-4
    assert 1e-4 < abs(parity.loss_difference(exact, fp8)) < 0.2


def test_fp8_may_lose_a_percent_of_loss_and_a_point_of_matches_and_no_more(parity):
    exact = parity.Ending(trained_loss=0.1, served_loss=0.1, kl=0.0, match=0.99)

    def judged(**changed):
        return parity.is_as_good(exact, dataclasses.replace(exact, **changed))

    assert judged(trained_loss=0.1009, match=0.98)
    assert judged(trained_loss=0.05, match=1.0)
    assert not judged(trained_loss=0.1011)
    assert not judged(match=0.975)
    assert not judged(trained_loss=float("nan"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here, which may well compute in FP8")
def test_without_a_gpu_the_fp8_mode_says_in_one_sentence_what_it_needs(parity, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["parity.py", "fp8"])
    with pytest.raises(SystemExit, match=r"compute capability 8\.9") as ended:
        parity.main()
    assert "\n" not in str(ended.value)
