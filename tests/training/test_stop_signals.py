"""Signals: noted while training runs, obeyed after the step, and a second one ends at once."""

import os
import signal
import threading

import pytest
from transformers import TrainerCallback

from little_trainer import assert_same, trainer
from lorafit.runs import Checkpoint
from lorafit.runs.checkpoint import checkpoint_folders
from lorafit.runs.signals import StopSignals
from tiny_models import save_base


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return str(save_base(tmp_path_factory.mktemp("base")))


class Send(TrainerCallback):
    """Sends this process `number` at `event` of step `step`."""

    def __init__(self, number, step, event="on_step_begin"):
        self.number, self.step = number, step
        setattr(self, event, self.send)

    def send(self, args, state, control, **_):
        if state.global_step == self.step:
            self.step = -1
            os.kill(os.getpid(), self.number)


def run(base, folder, *callbacks, resume=None, **given):
    signals = StopSignals()
    one = trainer(base, folder, callbacks, signals, **given)
    with signals:
        one.run(resume)
    return one


@pytest.fixture(scope="module")
def undisturbed(base, tmp_path_factory):
    return run(base, tmp_path_factory.mktemp("undisturbed"), save_steps=5)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_step_is_finished_a_checkpoint_written_and_the_run_can_go_on(undisturbed, base, tmp_path, number):
    stopped = run(base, tmp_path, Send(number, 3), save_steps=5)
    assert (stopped.signals.stop, stopped.state.global_step) == (number, 4)
    best, folder = checkpoint_folders(tmp_path)
    assert (Checkpoint.open(best).step, Checkpoint.open(folder).step) == (3, 4), "the best evaluation's, and the last"
    assert_same(undisturbed, run(base, tmp_path, resume=folder, save_steps=5))


def test_a_signal_in_an_evaluation_leaves_it_owed_and_the_resumed_run_makes_up_for_it(undisturbed, base, tmp_path):
    one = trainer(base, tmp_path, save_steps=5)
    hook = one.model.register_forward_pre_hook(lambda module, given: sent(module))

    def sent(module):
        if not module.training and one.state.global_step == 3:
            hook.remove()
            os.kill(os.getpid(), signal.SIGTERM)

    with one.signals:
        one.run()
    assert one.state.global_step == 3
    assert not [entry for entry in one.state.log_history if "eval_loss" in entry]
    resumed = run(base, tmp_path, resume=tmp_path / "step-000003", save_steps=5)
    assert_same(undisturbed, resumed)


class StoppedInEvaluations(StopSignals):
    """A signal has come whenever the model evaluates."""

    def watch(self, model):
        def note(module, given):
            if not module.training:
                self.stop = signal.SIGTERM

        model.register_forward_pre_hook(note)


def test_a_signal_in_an_owed_evaluation_leaves_it_owed_again(undisturbed, base, tmp_path):
    for resume in (None, tmp_path / "step-000003"):
        signals = StoppedInEvaluations()
        one = trainer(base, tmp_path, signals=signals, save_steps=5)
        signals.watch(one.model)
        one.run(resume)
        assert (one.state.global_step, one.owes_evaluation) == (3, True)
    assert [path.name for path in checkpoint_folders(tmp_path)] == ["step-000003"]
    assert_same(undisturbed, run(base, tmp_path, resume=tmp_path / "step-000003", save_steps=5))


def test_sigusr1_writes_a_checkpoint_and_goes_on(undisturbed, base, tmp_path):
    one = run(base, tmp_path, Send(signal.SIGUSR1, 1), save_steps=5, keep_last=99)
    assert [path.name for path in checkpoint_folders(tmp_path)] == [f"step-{step:06}" for step in (2, 3, 5, 10)]
    assert_same(undisturbed, one)


def test_a_second_signal_ends_at_once_and_without_harm(base, tmp_path):
    one = trainer(base, tmp_path)
    first, second = Send(signal.SIGINT, 3, "on_step_begin"), Send(signal.SIGINT, 3, "on_pre_optimizer_step")
    one.callbacks.handler.callbacks += [first, second]
    with pytest.raises(KeyboardInterrupt), one.signals:
        one.run()
    assert one.state.global_step == 3
    one.checkpoints.wait()
    assert [Checkpoint.open(path).step for path in checkpoint_folders(tmp_path)] == [1, 2, 3]


def test_the_handlers_are_put_back_and_who_watches_is_told():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    said = []
    with StopSignals(said.append) as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGUSR1)
    assert said == [signal.SIGTERM]
    assert signals.save
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)] == before


def test_outside_the_main_thread_nothing_is_touched():
    before, failed = signal.getsignal(signal.SIGTERM), []

    def inside():
        try:
            with StopSignals():
                failed.append(signal.getsignal(signal.SIGTERM) is not before)
        except ValueError as error:
            failed.append(error)

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert failed == [False]
