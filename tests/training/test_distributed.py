"""Processes: one alone is asked nothing; the two of test_loop.py agree through gloo."""

import torch

from lorafit.training.distributed import Processes


def test_one_process_is_the_main_one_and_gets_back_what_it_gives():
    alone, value = Processes(), torch.ones(3)
    weight = torch.nn.Parameter(torch.zeros(2))
    alone.add_gradients([weight])
    assert (alone.rank, alone.world, alone.is_main) == (0, 1, True)
    assert (alone.any(True), alone.any(False), alone.least(7)) == (True, False, 7)
    assert alone.total(value) is value
    assert weight.grad is None
