"""Processes: one alone is asked nothing; several agree through gloo, and train as one does."""

import socket
from functools import partial

import pytest
import torch

from fork_server import run_each
from gloo_worker import train_in_a_process
from lorafit.errors import ProcessLost, UsageError
from lorafit.training.distributed import MEETING, Processes, joined
from tiny_models import save_base

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return str(save_base(tmp_path_factory.mktemp("base")))


def test_one_process_is_the_main_one_and_gets_back_what_it_gives():
    alone, value = Processes(), torch.ones(3)
    weight = torch.nn.Parameter(torch.zeros(2))
    alone.add_gradients([weight])
    assert (alone.rank, alone.world, alone.is_main) == (0, 1, True)
    assert (alone.any(True), alone.any(False), alone.least(7), alone.most(7)) == (True, False, 7, 7)
    assert (alone.gathered(3), alone.from_main(lambda: 4), alone.together(lambda: 5)) == ([3], 4, 5)
    assert alone.total(value) is value
    assert weight.grad is None


def test_processes_that_cannot_meet_say_why(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in MEETING:
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UsageError, match="RANK is not set as a launcher does"), joined():
        pass
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        for name, value in zip(MEETING, ("0", "127.0.0.1", str(taken.getsockname()[1])), strict=True):
            monkeypatch.setenv(name, value)
        with pytest.raises(UsageError, match="another program has this port; give all"), joined():
            pass


def test_a_process_that_is_lost_while_the_base_is_read_is_told_in_a_sentence(monkeypatch):
    two = Processes()
    two.world, two.gathered = 2, lambda value: [value, None]
    with pytest.raises(ProcessLost, match="another process of this run has ended"):
        two.together(partial(_raise, RuntimeError("[gloo/transport] Connection closed by peer")))


def _raise(error):
    raise error


def in_processes(world, base, folder, short_rank=None):
    """What each of `world` processes ended in; that of `short_rank` runs out of memory once."""
    folder = folder / f"{world}-{short_rank}"
    folder.mkdir()
    given = (base, folder / "run", str(folder), short_rank)
    run_each(train_in_a_process, [(rank, world, *given) for rank in range(world)])
    return [torch.load(folder / f"{world}-{rank}.pt") for rank in range(world)]


@pytest.fixture(scope="module")
def alone(base, tmp_path_factory):
    (one,) = in_processes(1, base, tmp_path_factory.mktemp("alone"))
    return one


@pytest.mark.slow
@pytest.mark.parametrize(("world", "short_rank"), [(2, None), (3, 1)])
def test_several_processes_train_as_one_does(base, alone, tmp_path, world, short_rank):
    """DoRA, LoRA+, embedding and head whole; also when one process has to do a step again: all do, in one layout."""
    first, *others = in_processes(world, base, tmp_path, short_rank)
    assert len(first["hashes"]) == 8
    for other in others:
        assert other["hashes"] == first["hashes"], "the weights differ after a step"
        assert other["micro_tokens"] == first["micro_tokens"]
    assert (first["micro_tokens"] < 48) == (short_rank is not None)
    assert first["losses"] == pytest.approx(alone["losses"], rel=1e-5)
    for name in ("gradient", "weights"):
        assert float((first[name] - alone[name]).norm() / alone[name].norm()) < 1e-5
