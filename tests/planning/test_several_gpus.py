"""A plan for several GPUs: each takes its share, and their gradients are summed over a link."""

import pytest

from lorafit.config import RunConfig, resolve
from lorafit.errors import UsageError
from lorafit.hardware import hardware_for, hardware_named
from lorafit.hardware.device import link_between
from lorafit.memory import PlanInputs
from lorafit.memory.execution_plan import plan_execution
from lorafit.memory.sharded import moved_bytes
from lorafit.planning import make_plan
from lorafit.planning.forecast import forecast
from lorafit.planning.several_gpus import all_reduce_s, communication_s, several_in_words
from planning_shapes import facts, shape


def made(examples, **settings):
    """Inputs of an 8B whose memory policy is settled, so that only the number of GPUs differs."""
    settings = {"quantization": "nf4", "rank": 16, "alpha": 32, "max_length": 2048} | settings
    config = RunConfig(examples_per_step=examples, **settings)
    rows = facts(rows=64_000, mean=150, longest=300)
    return PlanInputs(config, rows, shape(), hardware_for(config))


@pytest.mark.parametrize(("gpu", "name"), [("2 x RTX 4090", "RTX 4090"), ("2x4090", "RTX 4090"), ("8 × H100", "H100")])
def test_several_gpus_are_named_with_their_number(gpu, name):
    device = hardware_named(gpu)
    assert (device.name, device.count) == (name, int(gpu[0]))
    assert made(64, gpu=gpu).gpus == int(gpu[0])


def test_a_number_that_contradicts_the_name_is_refused():
    assert made(64, gpu="H200", gpus=4).gpus == made(64, gpu="4xH200", gpus=4).gpus == 4
    assert made(64, gpu="4xH200", gpus="all").gpus == 4
    for gpus in (1, 2):
        with pytest.raises(UsageError, match=f"gpu names 4 GPUs, and gpus is {gpus}; leave gpus out"):
            made(64, gpu="4xH200", gpus=gpus)
    with pytest.raises(UsageError, match="one GPU or more"):
        hardware_named("0 x H200")
    with pytest.raises(UsageError, match="no GPU here to plan several of; name the GPU: gpu: 2 x RTX 4090"):
        made(64, gpu="cpu", gpus=2)


def test_twice_the_examples_on_two_gpus_take_the_memory_of_one_and_its_time_a_step():
    """Two H200s were measured at 2.00 times the speed of one, with as much work for each (2026-11-30)."""
    one, two = made(64, gpu="H200", epochs=3), made(128, gpu="2xH200", epochs=6)
    alone, both = forecast(one), forecast(two)
    assert both.gpus == 2
    assert both.memory.peak_bytes == alone.memory.peak_bytes
    assert both.duration.steps == alone.duration.steps and both.duration.tokens == 2 * alone.duration.tokens
    for first, second in zip(alone.duration.time_s, both.duration.time_s, strict=True):
        assert first < second < 1.01 * first
    assert both.cost_usd == both.duration.cost_usd(two.hardware, 2)


@pytest.mark.parametrize(
    ("gpu", "link"),
    [("H200", ("NVLink", 450.0)), ("RTX 4090", ("PCIe", 25.0)), ("A100", ("PCIe", 25.0)), ("GH200", ("PCIe", 55.0))],
)
def test_gradients_are_summed_over_the_link_between_the_gpus(gpu, link):
    device = hardware_named(gpu)
    assert link_between(device) == link
    four = made(64, gpu=f"4 x {gpu}")
    size = 4 * 16 * 32 * (4096 + 4096 + 4096 + 1024)  # fp32, rank, layers, inputs and outputs of q and v
    assert all_reduce_s(four) == pytest.approx(1.5 * size / (link[1] * 1e9))
    words = several_in_words(four, plan_execution(four))
    assert f"27.3 MB of gradients summed over {link[0]} at {link[1]:.0f} GB/s (assumed)" in words
    assert words in forecast(four).duration.assumes
    one = made(64, gpu=gpu)
    assert not several_in_words(one, plan_execution(one)) and not all_reduce_s(one)


def full(gpus, name="H200", **flags):
    """The plan of training every weight of an 8B, 4 x 2,048 tokens a GPU."""
    settings = {"method": "full", "examples_per_step": 4 * gpus, "gpus": gpus, **flags}
    data = facts(rows=20_000, mean=2048, longest=2048)
    return make_plan(resolve({}, settings), data, shape(), hardware_named(name))


def parts(plan):
    return {part.name: part.size_bytes for part in plan.memory.components}


def test_each_gpu_holds_its_shard_of_every_weight_gradient_and_moment():
    two, four = full(2), full(4)
    assert two.runnable and not two.findings and two.settings()["optimizer"] == "adamw"
    held = [parts(plan) for plan in (two, four)]
    for name, size in (("weights", 4), ("gradients", 4), ("optimizer state", 8)):
        assert held[0][f"{name}, sharded"] == pytest.approx(size * two.shape.parameters / 2)
        assert held[1][f"{name}, sharded"] == pytest.approx(held[0][f"{name}, sharded"] / 2, rel=1e-6)
    assert held[0]["gathered weights"] == held[1]["gathered weights"] > 8 * 128_256 * 4_096
    assert two.inputs.checkpoint_bytes == 12 * two.shape.parameters
    eight_bit = parts(full(2, optimizer="adamw_8bit"))
    assert eight_bit["weights, sharded"] == eight_bit["gradients, sharded"] == two.shape.parameters


def test_gathering_costs_what_the_arithmetic_does_not_hide():
    fast, slow = full(2), full(8, "RTX 4090")
    assert "hold weights, gradients and moments in shards" in fast.time_assumes[-1]
    assert moved_bytes(fast.inputs)[0] == pytest.approx((8.03e9 - 1.05e9) * (2 * 2 + 4) / 2, rel=0.01)
    waits = [communication_s(plan.inputs, plan_execution(plan.inputs)) for plan in (fast, slow)]
    assert waits[0] < 0.02 < 0.1 < waits[1], "NVLink hides it, PCIe does not"


def test_sharded_weights_are_gathered_once_a_step_where_that_fits():
    for gib in (80, 140):
        plan = make_plan(
            resolve({}, {"method": "full", "examples_per_step": 8, "gpus": 2, "optimizer": "adamw"}),
            facts(rows=20_000, mean=2048, longest=2048),
            shape(),
            hardware_named("H200").with_memory(gib << 30),
        )
        assert plan.fits and plan_execution(plan.inputs).micro_batches == 1, gib


def test_what_train_refuses_of_shards_plan_refuses():
    small = full(2, "RTX 4090")
    assert not small.runnable and small.gpus == 7
    assert "on each of 2 GPUs, and RTX 4090 has 23.5 GiB" in small.findings[0].message
    assert small.findings[0].fix.startswith("set gpus: 7")
    assert full(7, "RTX 4090").runnable, "the fix works"
    (finding,) = full(2, memory_policy="offload").findings
    assert finding.where == "memory_policy" and "sharded" in finding.message
    assert not full(2, memory_policy="recompute").findings


def of_70b(gpu, **flags):
    resolved = resolve({}, {"gpu": gpu, "quantization": "nf4", "rank": 16, "examples_per_step": 8, **flags})
    data = facts(rows=20_000, mean=2_048, longest=2_048)
    big = shape(hidden_size=8_192, intermediate_size=28_672, num_hidden_layers=80, num_attention_heads=64)
    return make_plan(resolved, data, big, hardware_for(resolved.config))


def test_a_base_that_fits_no_single_gpu_is_shared():
    """Half of 70B in NF4 takes 16.4 GiB; a whole one would take 33."""
    plan = of_70b("2 x RTX 4090")
    parts = {part.name: part.size_bytes for part in plan.memory.components}
    (reason,) = [one.reason for one in plan.decisions if one.key == "shard_base"]
    assert plan.inputs.config.shard_base == "on" and plan.fits and "each holds 1/2 of every layer" in reason
    assert parts["base, layers, sharded"] == pytest.approx(16.45 * 2**30, rel=0.01)
    assert parts["gathered layers"] == pytest.approx(4 * parts["base, layers, sharded"] / 80, rel=0.01)
    assert not plan.inputs.policy.dequantized_layers and not plan.inputs.policy.cuda_graph_max_tokens
    assert "2 GPUs, which share the base's layers" in " ".join(plan.notes)
    assert dict(of_70b("2 x H200").settings())["shard_base"] == "off"
    assert dict(of_70b("H200").settings())["shard_base"] == "off"
    refused = of_70b("2 x RTX 4090", dora=True).findings[0]
    assert (
        refused.message == "the base's layers are shared by 2 GPUs, and dora is set"
        and refused.fix == "set dora: false"
    )
