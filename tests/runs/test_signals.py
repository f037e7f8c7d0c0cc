"""Signals before the first step, and those that end a run at once: one sentence, everything cleaned up."""

import contextlib
import os
import signal
import threading

import pytest

from lorafit.errors import TrainingStopped
from lorafit.runs import RunDir
from lorafit.runs.signals import EarlySignals, StopSignals

NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopping_signal_unwinds_what_is_inside_and_is_one_sentence(number):
    before, cleaned = [signal.getsignal(one) for one in NUMBERS], []
    with (
        pytest.raises(TrainingStopped, match=f"{number.name} stopped the run before training") as stopped,
        EarlySignals(),
    ):
        try:
            # what a library tries must not swallow it
            with contextlib.suppress(Exception):
                os.kill(os.getpid(), number)
        finally:
            cleaned.append(True)
    assert cleaned
    assert stopped.value.exit_code == 128 + number
    assert [signal.getsignal(one) for one in NUMBERS] == before


def test_sigusr1_is_survived_where_there_is_nothing_to_save():
    survived = False
    with EarlySignals():
        os.kill(os.getpid(), signal.SIGUSR1)
        survived = True
    assert survived


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_in_training_says_how_to_go_on(number):
    with pytest.raises(TrainingStopped, match="a second signal") as stopped, EarlySignals(), StopSignals():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), number)
    assert stopped.value.exit_code == 128 + number


@pytest.mark.parametrize("name", [None, "step-000120.damaged", "step-000120"])
def test_a_checkpoint_is_named_only_where_there_is_one(tmp_path, name):
    if name is not None:
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    said = "resumes from the newest checkpoint" if name == "step-000120" else "there is no checkpoint yet"
    with pytest.raises(TrainingStopped, match=said), EarlySignals() as signals, StopSignals():
        signals.run = RunDir(tmp_path)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)


def test_outside_the_main_thread_nothing_is_touched():
    before, seen = signal.getsignal(signal.SIGTERM), []

    def inside():
        with EarlySignals():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert seen == [before]
