"""A plan for several GPUs: each takes its share, and their gradients are summed over a link."""

import pytest

from lorafit.config import RunConfig
from lorafit.errors import UsageError
from lorafit.hardware import hardware_for, hardware_named
from lorafit.hardware.links import link_between
from lorafit.memory import PlanInputs
from lorafit.memory.execution_plan import plan_execution
from lorafit.planning.forecast import forecast
from lorafit.planning.several_gpus import all_reduce_s, several_in_words
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


def test_every_weight_trains_on_one_gpu():
    assert made(64, gpu="2xH200", method="full", quantization="none").gpus == 1
