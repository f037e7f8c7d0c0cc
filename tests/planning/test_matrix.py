from __future__ import annotations

import pytest

from lorafit.config import resolve
from lorafit.hardware import hardware_named
from lorafit.hardware.device import GIB, Hardware
from lorafit.planning import make_plan
from lorafit.planning.decisions import DEFAULT_SERVING, MATRIX, SERVING, Case, choose, rank_limit
from planning_shapes import TINY, facts, shape


@pytest.mark.parametrize(
    ("rows", "goal", "fits_16bit", "method", "rank", "quantization"),
    [
        (0, "balanced", True, "QLoRA", 8, "nf4"),
        (4_999, "balanced", True, "QLoRA", 8, "nf4"),
        (4_999, "accuracy", True, "QLoRA", 8, "nf4"),
        (5_000, "balanced", True, "LoRA", 16, "none"),
        (5_000, "balanced", False, "QLoRA", 16, "nf4"),
        (50_000, "latency", True, "LoRA", 16, "none"),
        (50_000, "tenants", False, "QLoRA", 16, "nf4"),
        (50_001, "balanced", True, "LoRA", 32, "none"),
        (50_001, "balanced", False, "QLoRA", 32, "nf4"),
        (100_000, "accuracy", True, "LoRA", 32, "none"),
        (100_001, "accuracy", True, "full fine-tuning", 0, "none"),
        (100_001, "accuracy", False, "full fine-tuning", 0, "none"),
        (100_001, "balanced", True, "LoRA", 32, "none"),
        (20_000, "budget", True, "QLoRA", 8, "nf4"),
        (1_000_000, "budget", True, "QLoRA", 8, "nf4"),
    ],
)
def test_each_row_of_the_matrix(rows, goal, fits_16bit, method, rank, quantization):
    rule = choose(Case(rows, goal, fits_16bit))
    assert (rule.method, rule.rank, rule.quantization) == (method, rank, quantization)


def test_every_row_of_the_matrix_can_be_chosen():
    cases = [
        Case(rows, goal, fits)
        for rows in (100, 20_000, 80_000, 200_000)
        for goal in ("balanced", "budget", "accuracy")
        for fits in (True, False)
    ]
    assert {id(choose(case)) for case in cases} == {id(rule) for rule in MATRIX}


def test_every_row_says_when_and_why():
    assert len({rule.when for rule in MATRIX}) == len(MATRIX)
    assert all(rule.rank_reason and rule.base_reason for rule in MATRIX)


def test_serving_follows_the_goal():
    assert SERVING["latency"][0] == "merged"
    assert SERVING["tenants"][0] == "adapters"
    assert DEFAULT_SERVING[0] == "merged"


@pytest.mark.parametrize(("rows", "limit"), [(1, 8), (4_999, 8), (5_000, 16), (50_000, 16), (50_001, 32), (10**6, 32)])
def test_the_rank_that_so_many_rows_can_fill(rows, limit):
    assert rank_limit(rows) == limit


def options(hardware, rows=20_000, config=None):
    return make_plan(resolve(), facts(rows=rows), shape(config) if config else shape(), hardware).options


def test_every_row_of_the_matrix_is_priced_and_one_is_chosen():
    priced = options(hardware_named("4090"))
    assert [(option.method, option.rank) for option in priced] == [(rule.method, rule.rank) for rule in MATRIX]
    assert sum(option.chosen for option in priced) == 1
    for option in priced:
        assert 0 < option.cost_usd[0] < option.cost_usd[1]
        assert 0 < option.time_s[0] < option.time_s[1]


def test_the_chosen_row_is_the_plan_itself():
    plan = make_plan(resolve(), facts(), shape(), hardware_named("4090"))
    [chosen] = [option for option in plan.options if option.chosen]
    assert (chosen.time_s, chosen.cost_usd) == (plan.time_s, plan.cost_usd)
    assert chosen.peak_bytes == plan.memory.needed_bytes <= plan.memory.peak_bytes


def test_what_unpacked_weights_take_of_a_large_gpu_is_nothing_that_a_method_needs():
    small, large = (
        make_plan(
            resolve(flags={"memory_policy": policy, "quantization": "nf4"}), facts(), shape(), hardware_named("H200")
        )
        for policy in ("keep", "weights=dense")
    )
    assert large.memory.peak_bytes > small.memory.peak_bytes == large.memory.needed_bytes
    peaks = [next(option.peak_bytes for option in plan.options if option.chosen) for plan in (small, large)]
    assert peaks[0] == peaks[1]


def test_a_16_bit_base_needs_more_and_may_not_fit():
    priced = options(hardware_named("4090").with_memory(12 * GIB))
    by_method = {option.method: option for option in priced if option.rank == 16}
    assert not by_method["LoRA"].fits
    assert by_method["QLoRA"].fits


def test_full_fine_tuning_takes_one_device_or_several_gpus_and_their_price():
    assert options(hardware_named("H100"))[0].gpus == 1
    full = options(hardware_named("RTX 3060"))[0]
    assert full.gpus == 13  # 16 bytes × 8.03 B parameters in 80 % of 11.8 GiB each
    assert full.hardware == "RTX 3060"
    cpu = Hardware("a CPU", "cpu", 16 * GIB, cores=2)
    assert options(cpu, config=TINY)[0].hardware == "a CPU"
    assert options(cpu)[0].hardware == "H100"
