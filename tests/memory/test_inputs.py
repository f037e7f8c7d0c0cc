from __future__ import annotations

import dataclasses

import pytest

from lorafit.config import RunConfig
from lorafit.config.memory_policy import MemoryPolicy
from lorafit.hardware.device import GIB, Hardware
from lorafit.memory import DataStats
from lorafit.memory.inputs import LARGEST_TOKENS, most_tokens, policy_of
from planning_shapes import facts, inputs

CPU = Hardware("a CPU", "cpu", 16 * GIB, cores=2)


def test_a_micro_batch_is_never_larger_than_a_step_or_the_data():
    assert inputs(RunConfig(), facts(longest=900)).micro_batch(2048).tokens == 2048
    assert inputs(RunConfig(examples_per_step=2), facts(longest=100)).micro_batch(2048).tokens == 200
    assert inputs(RunConfig(), facts(rows=3, mean=20, longest=30)).micro_batch(2048).tokens == 60
    assert inputs(RunConfig(), DataStats(0, 0, 0, 0, 0.0)).micro_batch(2048).tokens == 1


def test_a_step_that_was_counted_is_as_large_as_it_was_counted():
    counted = DataStats(2000, 300_000, 150_000, 900, 150.0, largest_step=3_600)
    assert inputs(RunConfig(), counted).micro_batch(16_384).tokens == 3_600
    assert inputs(RunConfig(), facts(longest=900)).micro_batch(16_384).tokens == 16 * 900


def test_a_row_longer_than_the_limit_goes_alone_and_whole():
    assert inputs(RunConfig(), facts(longest=900)).micro_batch(100).tokens == 900


def test_more_of_the_largest_micro_batch_is_supervised_than_of_the_mean_one():
    batch = inputs(stats=facts(supervised=0.5)).micro_batch(2048)
    assert (batch.tokens, batch.supervised, batch.longest) == (2048, 1280, 900)
    assert inputs(RunConfig(), facts(supervised=0.9)).micro_batch(2048).supervised == 2048


@pytest.mark.parametrize(
    ("step", "max_length", "most"),
    [
        (600, 2048, 2048),  # it holds the step anyway
        (3_600, 2048, 3_600),
        (LARGEST_TOKENS, 2048, LARGEST_TOKENS),
        (100_000, 2048, LARGEST_TOKENS),
        (100_000, 32_768, 32_768),
    ],
)
def test_a_micro_batch_may_grow_to_the_step_until_nothing_is_gained(step, max_length, most):
    assert most_tokens(step, max_length) == most


def test_only_a_gpu_gains_by_larger_micro_batches():
    counted = DataStats(2000, 300_000, 150_000, 900, 150.0, largest_step=3_600)
    assert inputs(stats=counted).most_tokens == 3_600
    assert inputs(stats=counted, hardware=CPU).most_tokens == 2048


def test_data_stats_are_frozen_and_default_to_no_held_out_rows():
    stats = DataStats(rows=2, tokens=10, supervised_tokens=4, longest=6, mean_tokens=5.0)
    assert stats.holdout_rows == 0
    with pytest.raises(dataclasses.FrozenInstanceError):
        stats.rows = 3


@pytest.mark.parametrize(
    ("settings", "policy"),
    [
        ({}, None),
        ({"memory_policy": "recompute"}, MemoryPolicy(recompute_layers=32)),
        ({"gradient_checkpointing": "reentrant"}, MemoryPolicy(recompute_layers=32)),
        ({"memory_policy": "keep"}, MemoryPolicy()),
        ({"memory_policy": "recompute"}, MemoryPolicy(recompute_layers=32)),
        ({"memory_policy": "offload"}, MemoryPolicy(offloaded_layers=32)),
        (
            {"memory_policy": "recompute_layers=99,offloaded_layers=99"},
            MemoryPolicy(recompute_layers=32, offloaded_layers=32),
        ),
    ],
)
def test_a_config_asks_for_one_policy_or_leaves_it_to_the_plan(settings, policy):
    assert policy_of(RunConfig(**settings), 32) == policy
