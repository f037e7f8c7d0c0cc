"""Random generators: what they draw after a restore is what they would have drawn."""

import json
import random

import numpy as np
import torch

from lorafit.training.checkpoints.snapshot import generators_state, restore_generators


def draws():
    return (
        random.random(),
        random.gauss(0, 1),
        float(np.random.rand()),
        float(np.random.randn()),
        torch.rand(3).tolist(),
    )


def test_every_generator_goes_on_where_it_stood():
    draws()  # a half of a Gaussian pair is pending now, in Python's and in numpy's
    tensors, rest = generators_state()
    rest = json.loads(json.dumps(rest))
    wanted = draws(), draws()
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    restore_generators(tensors, rest)
    assert (draws(), draws()) == wanted
