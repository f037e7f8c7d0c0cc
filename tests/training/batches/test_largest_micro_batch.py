"""What is tried is as large as anything that training will run."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from little_run import encoded_rows, settings
from lorafit.data import largest_step
from lorafit.objectives import Sft
from lorafit.training.batches import Layout, MicroBatchSearch, StepDataset

LENGTHS = (9, 12, 15, 30, 31, 32, 20, 8, 11, 26, 5, 17)
EPOCHS = 5


def every_micro_batch(rows, config, micro_tokens):
    """Tokens of every micro-batch of the whole run."""
    steps, sizes = StepDataset(rows, config, Layout(micro_tokens)), []
    for epoch in range(EPOCHS):
        sizes += [batch.tokens for step in steps.epoch(epoch) for batch in step.micro_batches]
    return sizes


@given(st.lists(st.integers(2, 40), min_size=1, max_size=14), st.integers(1, 5), st.integers(1, 3))
def test_a_whole_step_is_tried_where_none_of_the_run_is_larger(lengths, examples, seed):
    config, rows = settings(examples_per_step=examples, epochs=EPOCHS, seed=seed), encoded_rows(*lengths)
    step = largest_step(rows.lengths, examples, seed, EPOCHS * -(-len(rows) // examples))
    whole = int(rows.lengths[step].sum())
    batch = MicroBatchSearch(rows, config, step=step).largest(whole)
    assert batch.tokens == whole == max(every_micro_batch(rows, config, whole))


@pytest.mark.parametrize("micro_tokens", [10, 32, 40, 64, 100, 4096])
def test_it_is_the_largest_of_the_first_epoch_or_the_longest_row(micro_tokens):
    config, rows = settings(examples_per_step=4, epochs=1), encoded_rows(*LENGTHS)
    steps = StepDataset(rows, config, Layout(micro_tokens))
    largest = max(batch.tokens for step in steps for batch in step.micro_batches)
    assert MicroBatchSearch(rows, config).largest(micro_tokens).tokens == max(largest, max(LENGTHS))


@pytest.mark.parametrize("micro_tokens", [10, 40, 64, 4096])
def test_with_several_processes_it_is_the_largest_of_any_of_them(micro_tokens):
    config, rows = settings(examples_per_step=6, epochs=1), encoded_rows(*LENGTHS)
    ranks = [StepDataset(rows, config, Layout(micro_tokens), rank=rank, world=2) for rank in range(2)]
    sizes = [max(LENGTHS), *(batch.tokens for steps in ranks for step in steps for batch in step.micro_batches)]
    search = MicroBatchSearch(rows, config, world=2)
    assert search.largest(micro_tokens).tokens == max(sizes)
    found = search.largest_within(micro_tokens, max(sizes) - 1)
    assert (found.tokens if found else None) == max((size for size in sizes if size < max(sizes)), default=None)


def test_a_step_too_large_is_cut_as_training_cuts_it():
    config, rows = settings(examples_per_step=4), encoded_rows(*LENGTHS)
    batch = MicroBatchSearch(rows, config, step=np.arange(len(rows))).largest(50)
    assert max(LENGTHS) < batch.tokens <= 50


@pytest.mark.parametrize("limit", [4, 5, 17, 31, 32, 50, 64, 4096])
@pytest.mark.parametrize("micro_tokens", [10, 64])
def test_the_largest_within_a_limit_is_one_of_those_that_training_cuts(micro_tokens, limit):
    config, rows = settings(examples_per_step=4, epochs=1), encoded_rows(*LENGTHS)
    steps = StepDataset(rows, config, Layout(micro_tokens))
    sizes = [max(LENGTHS), *(batch.tokens for step in steps for batch in step.micro_batches)]
    found = MicroBatchSearch(rows, config).largest_within(micro_tokens, limit)
    assert (found.tokens if found else None) == max((size for size in sizes if size <= limit), default=None)


def test_what_is_tried_is_laid_out_by_the_objective_of_the_run():
    class Marked(Sft):
        def collate(self, rows, indices):
            return "marked", sorted(indices)

    config, rows = settings(examples_per_step=4), encoded_rows(*LENGTHS)
    search = MicroBatchSearch(rows, config, Marked())
    assert search.largest(10) == ("marked", [5])
    assert search.largest_within(10, 5) == ("marked", [10])
