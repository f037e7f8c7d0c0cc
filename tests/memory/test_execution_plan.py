from itertools import pairwise

import pytest

from lorafit.config import RunConfig
from lorafit.config.memory_policy import MemoryPolicy
from lorafit.hardware import hardware_named
from lorafit.hardware.device import GIB, Hardware
from lorafit.memory import DataStats, PlanInputs, estimate_memory
from lorafit.memory.execution_plan import STEP_S, plan_execution, room_of
from planning_shapes import LLAMA_1B, LLAMA_8B, TINY, facts, shape

H200 = hardware_named("H200")
CPU = Hardware("a CPU", "cpu", 16 * GIB, cores=2)
DENSE = DataStats(64, 64 * 2048, 64 * 2048, 2048, 2048.0)
BUDGETS = (6.5, 7, 8, 10, 12, 16, 24, 40)


def planned(gib=None, config=LLAMA_8B, rows=DENSE, hardware=H200, **settings):
    device = hardware.with_memory(int(gib * GIB)) if gib else hardware
    run = RunConfig(max_length=8192, examples_per_step=4, **settings)
    return (
        plan_execution(PlanInputs(run, rows, shape(config), device)),
        estimate_memory(PlanInputs(run, rows, shape(config), device)),
        device,
    )


@pytest.mark.parametrize("gib", BUDGETS)
@pytest.mark.parametrize("targets", ["qv", "all-linear"])
def test_the_plan_keeps_to_the_budget(gib, targets):
    plan, memory, device = planned(gib, targets=targets)
    assert memory.fits(device)
    assert plan.host_bytes == memory.host_bytes <= device.host_bytes


def test_where_there_is_room_the_estimate_s_error_is_spared():
    for gib in (8, 16, 24, 40):
        _, memory, device = planned(gib)
        assert memory.peak_bytes * (1 + memory.uncertainty) <= device.memory_bytes


ROWS = DataStats(2000, 300_000, 150_000, 900, 150.0, largest_step=3_840)
MANY = DataStats(20_000, 3_000_000, 1_500_000, 900, 150.0, largest_step=14_000)


def plan_of(rows=ROWS, gib=None, hardware=H200, config=LLAMA_8B, **settings):
    device = hardware.with_memory(int(gib * GIB)) if gib else hardware
    return plan_execution(PlanInputs(RunConfig(**settings), rows, shape(config), device))


def test_a_micro_batch_grows_to_the_whole_step_where_that_fits():
    plan = plan_of()
    assert (plan.tokens, plan.micro_batches, plan.policy) == (
        3_840,
        1,
        MemoryPolicy(
            micro_tokens=3_840, dequantized_layers=32, cuda_graph_max_tokens=plan.policy.cuda_graph_max_tokens
        ),
    )
    assert 2_400 <= plan.policy.cuda_graph_max_tokens < 3_840
    assert plan_of(MANY, examples_per_step=64).policy == MemoryPolicy(micro_tokens=14_000, dequantized_layers=32)


def test_it_grows_no_further_than_is_worth_it():
    huge = DataStats(20_000, 3_000_000, 1_500_000, 900, 150.0, largest_step=50_000)
    plan = plan_of(huge, examples_per_step=256)
    assert (plan.tokens, plan.micro_batches) == (16_384, 3)


@pytest.mark.parametrize("gib", [7, 8, 12, 16, 24, 40])
@pytest.mark.parametrize("rows", [ROWS, MANY])
def test_where_the_whole_step_does_not_fit_it_is_cut_until_it_does(gib, rows):
    examples = 64 if rows is MANY else 16
    run, device = RunConfig(examples_per_step=examples), H200.with_memory(gib * GIB)
    plan, memory = (
        plan_execution(PlanInputs(run, rows, shape(), device)),
        estimate_memory(PlanInputs(run, rows, shape(), device)),
    )
    assert memory.fits(device)
    assert rows.longest <= plan.tokens <= rows.largest_step
    whole = plan_of(rows, memory_policy=f"micro_tokens={plan.tokens}", examples_per_step=examples)
    assert plan.policy.micro_tokens == (plan.tokens if plan.tokens != 2048 else None)
    assert plan.micro_batches == whole.micro_batches


def test_where_there_is_room_a_whole_step_is_faster_than_its_parts():
    grown, cut = plan_of(), plan_of(memory_policy="keep")
    assert (cut.tokens, cut.micro_batches, cut.policy) == (2048, 2, MemoryPolicy())
    assert grown.step_s < cut.step_s
    assert grown.step_tokens == cut.step_tokens == 2400


@pytest.mark.parametrize("rows", [ROWS, MANY, DENSE])
@pytest.mark.parametrize("gib", [7, 16, 60])
def test_the_policy_as_it_is_written_is_planned_as_it_was_chosen(rows, gib):
    chosen = plan_of(rows, gib)
    assert plan_of(rows, gib, memory_policy=str(chosen.policy)) == chosen


def test_a_step_within_max_tokens_needs_no_word_about_its_micro_batch():
    short = DataStats(2000, 40_000, 20_000, 90, 20.0, largest_step=600)
    plan = plan_of(short)
    assert (plan.tokens, plan.micro_batches, plan.policy) == (
        600,
        1,
        MemoryPolicy(dequantized_layers=32, cuda_graph_max_tokens=600),
    )


def test_a_policy_by_hand_has_the_micro_batch_that_it_says_else_max_tokens():
    assert plan_of(memory_policy="recompute").tokens == 2048
    assert plan_of(memory_policy="keep").tokens == 2048
    assert plan_of(memory_policy="recompute,micro_tokens=3000").tokens == 3_000
    assert plan_of(memory_policy="micro_tokens=99999").tokens == 3_840  # no step has more
    assert plan_of(memory_policy="micro_tokens=100").tokens == 900  # a row is never cut


@pytest.mark.parametrize("gib", [4, 6, 16])
def test_on_a_processor_max_tokens_stays_the_micro_batch(gib):
    plan = plan_of(gib=gib, hardware=CPU, config=LLAMA_1B)
    assert plan.tokens <= 2048
    assert plan_of(hardware=CPU, config=TINY).policy == MemoryPolicy()


def test_every_micro_batch_of_a_step_costs_its_kernel_starts():
    """A layer too small to be anything but launches: two micro-batches take twice as long as one."""
    one, two = (plan_of(config=TINY, memory_policy=f"micro_tokens={tokens}") for tokens in (3_840, 2_048))
    assert two.step_s - STEP_S == pytest.approx(2 * (one.step_s - STEP_S), rel=0.05)


def test_more_memory_is_never_slower():
    # 6.5 GiB is planned without the estimate's error to spare, the rest with it
    speeds = [planned(gib)[0].tokens_per_s for gib in BUDGETS[1:]]
    # but for what is not worth pinning host memory
    assert all(more > 0.99 * less for less, more in pairwise(speeds))
    assert speeds[-1] > 1.2 * speeds[0]


def test_everything_stays_on_a_large_gpu_and_weights_lie_unpacked_there():
    plan, _, _ = planned()
    assert (plan.policy, plan.host_bytes) == (MemoryPolicy(dequantized_layers=32), 0)


def test_where_nothing_fits_the_least_is_planned_and_does_not_fit():
    plan, memory, device = planned(4)
    assert plan.policy == MemoryPolicy(
        recompute_layers=32, offloaded_layers=32, host_embeddings=True, micro_tokens=2048
    )
    assert not memory.fits(device)


@pytest.mark.parametrize("longest", [300, 1024, 3000, 8192])
def test_no_micro_batch_is_smaller_than_the_longest_row(longest):
    rows = DataStats(64, 64 * 300, 64 * 300, longest, 300.0)
    plan, _, _ = planned(6.2, rows=rows)
    assert plan.tokens >= longest


def test_what_is_set_by_hand_is_planned_as_it_is():
    policy = "recompute_mlp_layers=3,recompute_layers=2,offloaded_layers=7,host_embeddings=on,micro_tokens=4096"
    assert str(planned(8, memory_policy=policy)[0].policy) == policy
    assert planned(8, memory_policy="keep")[0].policy == MemoryPolicy()


def test_a_processor_recomputes_and_sends_nothing_away():
    assert planned(hardware=CPU, config=TINY)[0].policy == MemoryPolicy()
    plan, memory, device = planned(8, hardware=CPU, config=LLAMA_1B)
    assert plan.policy.offloaded_layers == plan.host_bytes == 0
    assert plan.policy != MemoryPolicy()
    assert memory.fits(device)


def test_host_memory_bounds_what_leaves():
    small = Hardware(**{**{name: getattr(H200, name) for name in H200.__slots__}, "host_bytes": GIB})
    plan, _, _ = planned(8, hardware=small)
    assert plan.host_bytes <= GIB


def test_the_room_is_what_stays_on_the_device_leaves():
    run = RunConfig(max_length=8192, memory_policy="keep")
    memory = estimate_memory(PlanInputs(run, DENSE, shape(), H200))
    passing = {"activations", "loss or one layer's backward", "fragmentation"}
    stays = sum(part.size_bytes for part in memory.components if part.name not in passing)
    assert room_of(PlanInputs(run, facts(), shape(), H200), 8192).device_bytes == H200.memory_bytes - stays
    assert room_of(PlanInputs(run, facts(), shape(), CPU), 8192).link is None


def test_a_step_is_as_long_as_its_tokens():
    short, long = (planned(rows=DataStats(64, 64 * n, 64 * n, n, float(n)))[0] for n in (500, 1000))
    assert (short.step_tokens, long.step_tokens) == (2000, 4000)
    assert short.step_s < long.step_s


def test_no_rows_at_all_are_planned_without_a_crash():
    plan, _, _ = planned(config=TINY, rows=DataStats(0, 0, 0, 0, 0.0))
    assert plan.tokens == 1
    assert planned(config=TINY, rows=facts(rows=1))[0].step_s > 0


def test_on_a_processor_sending_away_saves_nothing():
    kept, sent = (planned(hardware=CPU, config=TINY, memory_policy=policy)[1] for policy in ("keep", "offload"))
    assert sent.peak_bytes == kept.peak_bytes
    assert sent.host_bytes == 0


def test_weights_kept_unpacked_take_two_bytes_each_and_no_time():
    packed, small, _ = planned(memory_policy="keep", compute="bf16")
    dense, large, _ = planned(memory_policy="keep,weights=dense", compute="bf16")
    assert large.peak_bytes - small.peak_bytes == pytest.approx(2 * shape(LLAMA_8B).linear_parameters, rel=0.01)
    assert dense.step_s < packed.step_s
    half = planned(memory_policy="dequantized_layers=16", compute="bf16")[1]
    assert half.peak_bytes - small.peak_bytes == pytest.approx(shape(LLAMA_8B).linear_parameters, rel=0.01)
    eight_bits = [
        planned(memory_policy=policy, compute="fp8")[1].peak_bytes for policy in ("dequantized_layers=32", "keep")
    ]
    assert eight_bits[0] - eight_bits[1] == large.peak_bytes - small.peak_bytes  # e4m3, one copy for either direction
    unquantised = [
        planned(memory_policy=policy, quantization="none")[1].peak_bytes for policy in ("dequantized_layers=32", "keep")
    ]
    assert unquantised[0] == unquantised[1]


@pytest.mark.parametrize("budget_gib", [16, 31, 36, 40, 44, 60, 141])
def test_weights_are_unpacked_into_what_keeping_everything_leaves_and_never_for_anything_else(budget_gib):
    gpu = H200.with_memory(budget_gib * GIB)
    plan, memory, _ = planned(hardware=gpu, compute="bf16")
    assert memory.peak_bytes * (1 + memory.uncertainty) <= gpu.memory_bytes
    if plan.policy.dequantized_layers:
        assert plan.policy.keeps_everything
    if 0 < plan.policy.dequantized_layers < 32:
        more = planned(
            hardware=gpu, compute="bf16", memory_policy=f"dequantized_layers={plan.policy.dequantized_layers + 1}"
        )[1]
        assert more.peak_bytes * (1 + more.uncertainty) > gpu.memory_bytes
    assert (plan.policy.dequantized_layers == 32) == (budget_gib >= 60)


SMALL = DataStats(2000, 400_000, 200_000, 200, 200.0, largest_step=1600)


@pytest.mark.parametrize("compute", ["bf16", "fp8"])
def test_steps_that_wait_for_the_processor_run_as_graphs_before_room_goes_to_copies(compute):
    roomy, mid, tight = (
        planned(hardware=H200.with_memory(gib * GIB), rows=SMALL, compute=compute) for gib in (141, 24, 16)
    )
    assert roomy[0].policy == MemoryPolicy(dequantized_layers=32, cuda_graph_max_tokens=1600)
    assert mid[0].policy.cuda_graph_max_tokens == 1600 and 0 < mid[0].policy.dequantized_layers < 32
    assert tight[0].policy == MemoryPolicy(dequantized_layers=6)  # the engine fills what is left over with copies
    assert roomy[0].step_s < mid[0].step_s < tight[0].step_s / 2
    for plan, memory, gpu in (roomy, mid):
        assert memory.peak_bytes * (1 + memory.uncertainty) <= gpu.memory_bytes
        assert plan.graph_bytes == next(part.size_bytes for part in memory.components if part.name == "CUDA graphs")
        assert memory.needed_bytes == tight[1].needed_bytes


def test_large_steps_run_without_graphs_and_take_no_memory_for_them():
    plan = planned()[0]
    assert plan.policy.cuda_graph_max_tokens == plan.graph_bytes == 0


@pytest.mark.parametrize("settings", [{"compile": "off"}, {"compute": "fp16"}, {"compute": "fp32"}])
def test_layers_that_cannot_be_recorded_are_planned_without_graphs(settings):
    assert planned(rows=SMALL, **settings)[0].policy.cuda_graph_max_tokens == 0


def test_graphs_by_hand_take_nothing_where_there_are_none():
    for settings in (
        {"hardware": CPU},
        {"compile": "off"},
        {"memory_policy": "recompute_layers=32,cuda_graph_max_tokens=2048"},
    ):
        given = {"memory_policy": "cuda_graph_max_tokens=2048", **settings}
        plan, memory, _ = planned(rows=SMALL, **given)
        assert plan.graph_bytes == 0 and "CUDA graphs" not in [part.name for part in memory.components]


def test_capped_scores_are_planned_without_graphs():
    capped = {**LLAMA_8B, "model_type": "gemma2", "attn_logit_softcapping": 50.0}
    assert planned(rows=SMALL, config=capped)[0].policy.cuda_graph_max_tokens == 0
