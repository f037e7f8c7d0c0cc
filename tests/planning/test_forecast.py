from __future__ import annotations

import pytest

from lorafit.config import RunConfig
from lorafit.hardware import hardware_named
from lorafit.hardware.device import GIB, Hardware
from lorafit.memory import DataStats, PlanInputs, estimate_memory
from lorafit.memory.execution_plan import plan_execution
from lorafit.planning.forecast import (
    estimate_duration,
    forecast,
    full_duration,
    full_memory,
    gpus_needed,
    steps_of,
    token_flops,
)
from planning_shapes import LLAMA_1B, LLAMA_8B, TINY, facts, inputs, shape

H100 = hardware_named("H100")
CPU = Hardware("a CPU", "cpu", 16 * GIB, cores=2, usd_per_hour=(0.04, 0.10))


def test_adapters_are_forecast_for_the_device_given():
    run = forecast(PlanInputs(RunConfig(), facts(), shape(), H100))
    assert (run.hardware, run.gpus) == (H100, 1)
    assert run.memory == estimate_memory(PlanInputs(RunConfig(), facts(), shape(), H100))
    assert run.cost_usd == run.duration.cost_usd(H100)


def test_a_full_run_is_priced_for_all_its_gpus():
    run = forecast(PlanInputs(RunConfig(), facts(), shape(num_hidden_layers=240), H100), full=True)
    assert run.gpus > 1
    assert run.cost_usd == run.duration.cost_usd(H100, run.gpus)


def duration(config, run, hardware, rows):
    model = shape(config)
    return estimate_duration(
        PlanInputs(run, rows, model, hardware), plan_execution(PlanInputs(run, rows, model, hardware))
    )


@pytest.mark.parametrize(
    ("settings", "rows", "steps"),
    [
        ({}, 2_000, 375),
        ({"epochs": 1.0}, 17, 2),
        ({"epochs": 0.5}, 160, 5),
        ({"max_steps": 7}, 2_000, 7),
        ({"examples_per_step": 1}, 10, 30),
        ({}, 0, 3),
    ],
)
def test_steps_are_sets_of_examples(settings, rows, steps):
    assert steps_of(RunConfig(**settings), facts(rows=rows)) == steps


@pytest.mark.parametrize(
    ("config", "tokens", "checkpointing", "targets", "measured_ms"),
    [
        # the same eager runs on an H200 as in test_memory: milliseconds of one step
        (LLAMA_1B, 2048, "off", "qv", 105),
        (LLAMA_1B, 8192, "on", "qv", 194),
        (LLAMA_1B, 8192, "off", "all-linear", 220),
        (LLAMA_8B, 2048, "on", "qv", 437),
        (LLAMA_8B, 2048, "off", "qv", 282),
        (LLAMA_8B, 8192, "on", "qv", 861),
        (LLAMA_8B, 8192, "off", "qv", 590),
        (LLAMA_8B, 4096, "off", "all-linear", 509),
    ],
)
def test_the_range_holds_what_a_gpu_measured(config, tokens, checkpointing, targets, measured_ms):
    examples = tokens // 512
    run = RunConfig(
        max_length=tokens, targets=targets, gradient_checkpointing=checkpointing, examples_per_step=examples,
        max_steps=1000, epochs=1000, compile="off",
    )  # fmt: skip
    low, high = duration(
        config, run, hardware_named("H200"), DataStats(examples, tokens, tokens // 2, 512, 512.0)
    ).time_s
    assert low < measured_ms < high


def test_the_demo_base_trains_at_thousands_of_tokens_a_second_on_two_cores():
    run = RunConfig(memory_policy="keep", epochs=1000)
    taken = duration(TINY, run, CPU, facts(rows=1600, mean=50, longest=90))
    low, high = taken.time_s
    assert taken.tokens / high > 2_500
    assert taken.tokens / low < 10_000


def test_recomputing_costs_one_more_forward():
    kept, recomputed = (token_flops(inputs(), share) for share in (0.0, 1.0))
    assert recomputed - kept == pytest.approx(2 * 6_979_321_856, rel=0.01)


def test_evaluations_take_time_too():
    run = RunConfig(memory_policy="keep")
    without = duration(LLAMA_8B, run, hardware_named("T4"), facts(rows=5_000))
    held_out = duration(LLAMA_8B, run, hardware_named("T4"), facts(rows=5_000, holdout_rows=500))
    assert without.time_s[0] < held_out.time_s[0] < 1.1 * without.time_s[0]


def test_the_price_is_the_time_at_the_assumed_range():
    gpu = hardware_named("H100")
    taken = duration(LLAMA_8B, RunConfig(memory_policy="recompute"), gpu, facts())
    assert taken.cost_usd(gpu)[0] == pytest.approx(taken.time_s[0] / 3600 * gpu.usd_per_hour[0])
    assert taken.cost_usd(gpu, 4)[1] == pytest.approx(4 * taken.time_s[1] / 3600 * gpu.usd_per_hour[1])
    assert any("assumed" in line for line in taken.assumes)


@pytest.mark.parametrize("settings", [{"compute": "fp32"}, {"compute": "bf16"}])
def test_a_precision_the_device_lacks_is_slower(settings):
    device = hardware_named("H100") if settings["compute"] == "fp32" else CPU
    fitting = duration(LLAMA_8B, RunConfig(), device, facts(rows=50_000))
    lacking = duration(LLAMA_8B, RunConfig(**settings), device, facts(rows=50_000))
    assert lacking.time_s[1] > fitting.time_s[1]


@pytest.mark.parametrize("policy", ["keep", "recompute", "recompute_mlp_layers=16,offloaded_layers=8"])
def test_compiled_layers_take_what_the_policy_was_solved_with(policy):
    rows = DataStats(64, 64 * 2048, 64 * 2048, 2048, 2048.0)
    run = RunConfig(max_length=8192, examples_per_step=4, memory_policy=policy, max_steps=1000, epochs=1000)
    plan = plan_execution(PlanInputs(run, rows, shape(), hardware_named("H200")))
    low, high = estimate_duration(PlanInputs(run, rows, shape(), hardware_named("H200")), plan).time_s
    assert low < 1000 * plan.step_s < high < 2.2 * low


def test_few_tokens_take_what_starting_the_kernels_takes():
    few, none = (DataStats(16, 16 * tokens, 16 * tokens, tokens, float(tokens)) for tokens in (8, 1))
    kept, graphs = (
        RunConfig(examples_per_step=1, max_steps=1000, epochs=1000, memory_policy=policy)
        for policy in ("keep", "cuda_graph_max_tokens=64")
    )
    times = [duration(LLAMA_8B, kept, hardware_named("H200"), rows).time_s[0] for rows in (few, none)]
    assert times[0] == pytest.approx(times[1], rel=0.05)
    assert times[1] > 1000 * 32 * 2 * 0.8e-3
    assert duration(LLAMA_8B, graphs, hardware_named("H200"), few).time_s[0] < times[0] / 3


@pytest.mark.parametrize(("gpu", "config"), [("H100", {}), ("RTX 4090", {}), ("H200", {"num_hidden_layers": 80})])
def test_the_gpus_hold_weights_gradients_and_optimizer(gpu, config):
    device, model = hardware_named(gpu), shape(**config)
    gpus = gpus_needed(model, device)
    assert gpus * device.memory_bytes * 0.8 >= 16 * model.parameters > (gpus - 1) * device.memory_bytes * 0.8
    assert full_memory(inputs(model=model, hardware=device), gpus).fits(device)


def test_several_gpus_means_at_least_two():
    assert gpus_needed(shape(TINY), H100) == 2


def test_full_fine_tuning_costs_more_arithmetic_than_two_passes():
    taken = full_duration(inputs(stats=facts(rows=200_000), hardware=H100), gpus_needed(shape(), H100))
    flops = 8 * shape().active_parameters * taken.tokens
    assert taken.time_s[0] > flops / (gpus_needed(shape(), H100) * 989e12)
