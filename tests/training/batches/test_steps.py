"""A step is a set of examples; packing is only layout."""

import numpy as np
import pytest

from little_run import encoded_rows, settings
from lorafit.training import StepDataset

ROWS = encoded_rows(*np.random.default_rng(1).integers(5, 60, 50))


def examples(dataset):
    return [sorted(step.rows) for step in dataset]


def test_every_example_is_taken_once_an_epoch_and_the_order_changes():
    dataset = StepDataset(ROWS, settings(examples_per_step=8, max_length=128))
    first = [row for step in dataset for row in step.rows]
    second = [row for step in dataset.epoch(1) for row in step.rows]
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second
    assert len(dataset) == 7


def test_the_layout_does_not_change_which_examples_make_a_step():
    wide = StepDataset(ROWS, settings(examples_per_step=8, max_length=1024))
    narrow = StepDataset(ROWS, settings(examples_per_step=8, max_length=64))
    assert examples(wide) == examples(narrow)
    assert [step.supervised for step in wide] == [step.supervised for step in narrow]
    assert max(batch.tokens for step in narrow for batch in step.micro_batches) <= 64
    assert len(narrow[0].micro_batches) > len(wide[0].micro_batches)


def test_the_seed_decides_the_order():
    same = [examples(StepDataset(ROWS, settings(examples_per_step=8, seed=3))) for _ in range(2)]
    assert same[0] == same[1] != examples(StepDataset(ROWS, settings(examples_per_step=8, seed=4)))


@pytest.mark.parametrize("world", [2, 3, 8])
def test_processes_share_a_step_without_loss_and_almost_evenly(world):
    config = settings(examples_per_step=16, max_length=96)
    whole = StepDataset(ROWS, config)
    parts = [StepDataset(ROWS, config, rank=rank, world=world) for rank in range(world)]
    for index in range(len(whole)):
        steps = [part[index] for part in parts]
        counts = [len(step.micro_batches) for step in steps]
        assert max(counts) - min(counts) <= 1
        supervised = sum(batch.supervised for step in steps for batch in step.micro_batches)
        # a row's first token cannot be supervised, so the micro-batches' own count is the truth
        assert supervised == sum(batch.supervised for batch in whole[index].micro_batches) == steps[0].supervised
