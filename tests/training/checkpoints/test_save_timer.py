"""A checkpoint is due by the clock too, and whether it is changes no bit of the run."""

import itertools
import time

import pytest

from little_trainer import assert_same, trainer
from lorafit.config import RunConfig
from lorafit.runs.checkpoint import checkpoint_folders
from lorafit.training.checkpoints.writer import SaveTimer
from tiny_models import save_base

NEVER = {"save_steps": 1000, "keep_last": 99, "keep_best": 0}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return str(save_base(tmp_path_factory.mktemp("base")))


@pytest.fixture(scope="module")
def undisturbed(base, tmp_path_factory):
    one = trainer(base, tmp_path_factory.mktemp("undisturbed"), save_minutes=0, **NEVER)
    one.run()
    return one


def steps(folder):
    return [int(path.name[5:]) for path in checkpoint_folders(folder)]


def minutes_a_step(one, minutes):
    """The trainer, whose clock goes on by `minutes` with every step and by nothing else."""
    one.save_timer.now = lambda: one.state.global_step * minutes * 60.0
    return one


def test_nothing_is_due_before_the_time_is_over_and_all_of_it_counts_from_the_last_start():
    now = 100.0
    timer = SaveTimer(2, lambda: now)
    now = 219.0
    assert not timer.is_due()
    now = 220.0
    assert timer.is_due()
    timer.start()
    assert not timer.is_due()


def test_zero_turns_it_off():
    assert not SaveTimer(0, itertools.count(0, 1e9).__next__).is_due()


def test_a_clock_that_is_set_back_or_forth_is_not_asked(monkeypatch):
    monkeypatch.setattr(time, "time", itertools.cycle((0.0, 1e12)).__next__)
    timer = SaveTimer(15)
    assert not any(timer.is_due() for _ in range(4))


def test_a_quarter_of_an_hour_is_the_default():
    assert RunConfig().save_minutes == 15


def test_a_checkpoint_is_written_when_the_minutes_have_passed_since_the_last_one(undisturbed, base, tmp_path):
    one = minutes_a_step(trainer(base, tmp_path, save_minutes=15, **NEVER), 6)
    one.run()
    assert steps(tmp_path) == [3, 6, 9, 10]  # the last step's is always written
    assert_same(undisturbed, one)


def test_checkpoints_by_steps_count_as_the_last_one(base, tmp_path):
    one = minutes_a_step(trainer(base, tmp_path, save_minutes=15, save_steps=4, keep_last=99), 6)
    one.run()
    assert steps(tmp_path) == [3, 4, 7, 8, 10]


def test_the_run_goes_on_from_such_a_checkpoint_to_the_same_bits(undisturbed, base, tmp_path):
    one = minutes_a_step(trainer(base, tmp_path, save_minutes=15, **NEVER), 6)
    one.run()
    again = minutes_a_step(trainer(base, tmp_path / "again", save_minutes=1, **NEVER), 6)
    again.run(tmp_path / "step-000006")
    assert steps(tmp_path / "again") == [7, 8, 9, 10]
    assert_same(undisturbed, again)


def test_what_is_kept_is_chosen_as_ever(base, tmp_path):
    one = minutes_a_step(trainer(base, tmp_path, save_minutes=1, save_steps=3, keep_last=2, keep_best=1), 6)
    one.run()
    losses = {entry["step"]: entry["eval_loss"] for entry in one.state.log_history if "eval_loss" in entry}
    older = {step: loss for step, loss in losses.items() if step < 9}
    assert steps(tmp_path) == sorted({min(older, key=older.get), 9, 10})


def test_the_clock_is_read_once_a_step(base, tmp_path):
    one, reads = trainer(base, tmp_path, save_minutes=15, **NEVER), []
    one.save_timer.now = lambda: reads.append(one.state.global_step) or 0.0
    one.run()
    assert reads == [0, *range(1, 11), 10]  # when it begins, after each step, and after the save at the end
