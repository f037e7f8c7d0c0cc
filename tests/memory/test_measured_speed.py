"""Predictions from the data sheet against `lorafit train` on one H200, 2026-11-22, torch 2.11, transformers 5.17.

Llama-3.1-8B shape, NF4, r = 16 on q and v, no dropout, compiled layers. Speeds are those of whole steps; peaks are what
the allocator reserved, CUDA's own memory not counted, nor is it in the budgets.
"""

import pytest

from lorafit.config import RunConfig
from lorafit.hardware import hardware_named
from lorafit.hardware.device import GIB
from lorafit.memory import DataStats, PlanInputs, estimate_memory
from lorafit.memory.execution_plan import plan_execution
from lorafit.memory.footprint import CUDA_CONTEXT_BYTES
from planning_shapes import LLAMA_1B, shape

H200 = hardware_named("H200")
INSTRUCTIONS = DataStats(6_400, 943_800, 538_000, 480, 9_438 / 64, largest_step=10_741)
"""Lognormal lengths, 64 examples a step; 57 % of the tokens are in the loss."""


def dense(rows, length):
    return DataStats(
        64 * rows, 64 * rows * length, 64 * rows * length, length, float(length), largest_step=rows * length
    )


MEASURED = [
    # rows, examples a step, policy, compute, budget in GiB, tokens/s, peak in GiB
    (dense(4, 2048), 4, "keep", "bf16", None, 18_388, 31.3),
    (dense(4, 2048), 4, "offloaded_layers=4,host_embeddings=on,micro_tokens=4096", "bf16", 16, 17_733, 15.4),
    (dense(4, 2048), 4, "recompute_mlp_layers=30,offloaded_layers=30,host_embeddings=on", "bf16", 8, 15_282, 7.27),
    (dense(4, 2048), 4, "recompute_mlp_layers=32,offloaded_layers=26,host_embeddings=on", "bf16", 8, 14_743, 7.68),
    (dense(4, 2048), 4, "recompute_mlp_layers=17,offloaded_layers=21,host_embeddings=on", "fp8", 16, 21_926, 15.9),
    (dense(4, 2048), 4, "keep", "fp8", 48, 25_488, 30.6),
    (dense(1, 2048), 1, "keep", "bf16", None, 14_234, 11.76),
    (dense(4, 512), 4, "keep", "bf16", None, 14_745, 11.76),
    (dense(1, 2048), 1, "dequantized_layers=32", "bf16", None, 17_574, 24.72),
    (dense(4, 512), 4, "dequantized_layers=32", "bf16", None, 18_627, 24.72),
    (dense(1, 2048), 1, "dequantized_layers=32,cuda_graph_max_tokens=2048", "bf16", None, 17_972, None),
    (dense(4, 512), 4, "dequantized_layers=32,cuda_graph_max_tokens=2048", "bf16", None, 18_922, None),
    (dense(4, 2048), 4, "dequantized_layers=22", "bf16", 40, 17_819, 39.28),
    (dense(4, 2048), 4, "dequantized_layers=31", "fp8", 48, 25_549, 43.26),
    (INSTRUCTIONS, 64, "keep,micro_tokens=10741", "bf16", None, 19_428, 38.6),
    (INSTRUCTIONS, 64, "keep,micro_tokens=10741", "fp8", None, 28_109, None),
]


def run_of(examples, policy, compute, budget_gib):
    settings = RunConfig(
        max_length=8192,
        examples_per_step=examples,
        memory_policy=policy,
        compute=compute,
        dropout=0.0,
        optimizer="adamw",
    )
    return settings, H200.with_memory(budget_gib * GIB + CUDA_CONTEXT_BYTES) if budget_gib else H200


def planned(rows, policy, compute, budget, stats):
    run, gpu = run_of(rows, policy, compute, budget)
    return plan_execution(PlanInputs(run, stats, shape(), gpu))


@pytest.mark.parametrize(("rows", "examples", "policy", "compute", "budget_gib", "measured", "peak_gib"), MEASURED)
def test_the_predicted_speed_is_within_a_tenth_of_what_a_gpu_did(
    rows, examples, policy, compute, budget_gib, measured, peak_gib
):
    run, gpu = run_of(examples, policy, compute, budget_gib)
    assert plan_execution(PlanInputs(run, rows, shape(), gpu)).tokens_per_s == pytest.approx(measured, rel=0.10)


def test_so_it_is_with_adapters_of_every_linear():
    run, gpu = run_of(4, "dequantized_layers=31", "bf16", 48)
    run = run.model_copy(update={"targets": "all-linear"})
    assert plan_execution(PlanInputs(run, dense(4, 2048), shape(), gpu)).tokens_per_s == pytest.approx(16_159, rel=0.10)
    memory = estimate_memory(PlanInputs(run, dense(4, 2048), shape(), gpu))
    assert memory.peak_bytes - CUDA_CONTEXT_BYTES == pytest.approx(44.09 * GIB, rel=memory.uncertainty)


@pytest.mark.parametrize(
    ("rows", "examples", "policy", "compute", "budget_gib", "measured", "peak_gib"),
    [row for row in MEASURED if row[-1]],
)
def test_the_estimated_peak_is_within_its_uncertainty_of_what_a_gpu_did(
    rows, examples, policy, compute, budget_gib, measured, peak_gib
):
    """Copies on their way to the host may fill the budget beyond the estimate, the least that must be there."""
    run, gpu = run_of(examples, policy, compute, budget_gib)
    memory = estimate_memory(PlanInputs(run, rows, shape(), gpu))
    peak = peak_gib * GIB + CUDA_CONTEXT_BYTES
    most = memory.peak_bytes * (1 + memory.uncertainty)
    assert memory.peak_bytes * (1 - memory.uncertainty) < peak
    assert peak < (max(most, gpu.memory_bytes) if "offload" in policy else most)


def test_so_it_is_with_a_small_model_whose_steps_are_graphs():
    """1B, 1 × 1,024 tokens: 11.7 ms a step. Rows of one length share a bucket, so that nothing runs beside its graph,
    and the peak is below what the plan allows for: a micro-batch as a graph and one beside it."""
    run, gpu = run_of(1, "dequantized_layers=16,cuda_graph_max_tokens=1024", "bf16", None)
    plan = plan_execution(PlanInputs(run, dense(1, 1024), shape(LLAMA_1B), gpu))
    assert plan.tokens_per_s == pytest.approx(87_465, rel=0.10)
    memory = estimate_memory(PlanInputs(run, dense(1, 1024), shape(LLAMA_1B), gpu))
    peak = 4.02 * GIB + CUDA_CONTEXT_BYTES
    assert memory.peak_bytes - plan.graph_bytes < peak * (1 + memory.uncertainty)
    assert memory.peak_bytes > peak * (1 - memory.uncertainty)


def test_what_recomputing_everything_costs_is_what_the_probe_paid():
    """17,375 and 11,798 tokens/s on the same GPU, before the engine was built."""
    kept, recomputed = (
        planned(4, policy, "bf16", None, dense(4, 2048)).tokens_per_s for policy in ("keep", "recompute")
    )
    assert kept / recomputed == pytest.approx(17_375 / 11_798, rel=0.03)


def test_a_step_of_2048_tokens_waits_for_the_processor():
    """The GPU computed for 110 of its 144 ms."""
    costs = planned(1, "keep", "bf16", None, dense(1, 2048)).costs
    assert costs.forward_s == costs.backward_s == costs.launch_s
    assert 32 * 2 * costs.launch_s + costs.loss_s == pytest.approx(0.144, rel=0.10)


def test_few_tokens_take_longer_each_than_many():
    small, large = (planned(rows, "keep", "bf16", None, dense(rows, 2048)).tokens_per_s for rows in (1, 4))
    assert large / small == pytest.approx(18_388 / 14_234, rel=0.10)
