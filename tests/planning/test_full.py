"""Plans of full fine-tuning: the most accurate optimizer that fits, and why."""

from dataclasses import replace

import pytest

from lorafit.config import RunConfig, resolve
from lorafit.hardware import hardware_named
from lorafit.hardware.device import GIB, Hardware
from lorafit.memory import estimate_memory
from lorafit.memory.execution_plan import plan_execution
from lorafit.planning import make_plan
from lorafit.planning.forecast import token_flops
from planning_shapes import LLAMA_1B, LLAMA_8B, TINY, facts, inputs, shape

CPU = Hardware("a CPU", "cpu", 16 * GIB, cores=2, usd_per_hour=(0.04, 0.10))
KEPT = {"quantization": "none", "memory_policy": "keep"}


def planned(hardware="H200", config=LLAMA_8B, rows=20_000, gib=None, **flags):
    device = hardware_named(hardware) if isinstance(hardware, str) else hardware
    device = device.with_memory(gib * GIB) if gib else device
    data = facts(rows=rows, mean=2_048, longest=2_048)
    return make_plan(resolve({}, {"method": "full", "examples_per_step": 4, **flags}), data, shape(config), device)


def parts(plan):
    return {part.name: part.size_bytes for part in plan.memory.components}


@pytest.mark.parametrize(
    ("given", "optimizer", "bytes_a_weight", "why"),
    [
        ({}, "adamw", 4 + 2 + 8, "fp32 master weights and 32-bit moments take"),
        ({"gib": 80}, "adamw_8bit", 2 + 2, "fp32 master weights need"),
        ({"hardware": CPU, "config": TINY}, "adamw", 4 + 8, "weights and moments in fp32 take"),
        ({"optimizer": "adamw_8bit"}, "adamw_8bit", 2 + 2, "set by you"),
        ({"hardware": "RTX 4090"}, "paged_adamw_8bit", 0.19, "8-bit ones take 15.2 GiB of host memory"),
    ],
)
def test_the_plan_chooses_the_precision_by_the_memory_and_says_why(given, optimizer, bytes_a_weight, why):
    plan = planned(**given)
    assert plan.method == "full fine-tuning" and plan.runnable and plan.fits and not plan.blocked
    settings = {decision.key: decision for decision in plan.decisions}
    assert settings["optimizer"].value == optimizer and why in settings["optimizer"].reason
    assert (settings["quantization"].value, settings["lr"].value) == ("none", 2e-5)
    assert not {"rank", "alpha"} & set(settings)
    held = sum(size for name, size in parts(plan).items() if name in ("master weights", "gradients", "optimizer state"))
    assert held == pytest.approx(bytes_a_weight * plan.trainable_parameters, rel=0.01)
    assert plan.trainable_parameters == plan.shape.parameters


def test_what_does_not_fit_one_device_names_the_memory_and_a_way_out():
    plan = planned("RTX 3060")
    assert not plan.runnable and plan.gpus > 1
    (finding,) = plan.findings
    assert finding.message.startswith("full fine-tuning needs about 19") and "RTX 3060 has 11.7 GiB" in finding.message
    assert "set method: lora and quantization: nf4" in finding.fix


def test_8b_trains_on_24_gib_with_its_moments_in_host_memory():
    """Several micro-batches would move 15 GiB of gradients to the host and back, so the plan avoids them."""
    plan = planned("H200", gib=24)
    assert plan.fits and plan.inputs.optimizer == "paged_adamw_8bit" and plan.memory.host_bytes > 15 * GIB
    assert plan.inputs.policy.micro_tokens == 4 * 2_048
    few = plan_execution(plan.inputs.with_settings(memory_policy="recompute,micro_tokens=8192"))
    many = plan_execution(plan.inputs.with_settings(memory_policy="recompute"))
    assert many.step_s - few.step_s > 3 * 2 * 15 * GIB / (plan.hardware.link_gbs * 1e9)
    assert not planned("RTX 4090", optimizer="adamw_8bit").runnable


def test_moments_that_host_memory_has_no_room_for_are_refused():
    (finding,) = planned(replace(hardware_named("RTX 4090"), host_bytes=8 * GIB)).findings
    assert finding.message == "the moments take 15.2 GiB of host memory, and 8.0 GiB may be pinned"


def test_a_weights_gradient_costs_as_much_as_a_forward_pass():
    lora, full = (inputs(RunConfig(method=method, **KEPT)) for method in ("lora", "full"))
    assert 1.4 < token_flops(full, 0.0) / token_flops(lora, 0.0) < 1.6
    costs = [plan_execution(one).costs for one in (lora, full)]
    assert 1.7 < costs[1].backward_s / costs[0].backward_s < 2.1


def test_the_head_trains_too_and_its_gradient_is_counted():
    lora, full = (inputs(RunConfig(method=method, **KEPT)) for method in ("lora", "full"))
    difference = plan_execution(full).costs.loss_bytes - plan_execution(lora).costs.loss_bytes
    assert difference == 4 * 128_256 * 4_096


def test_trained_embeddings_stay_on_the_device_and_no_graph_is_recorded():
    plan = planned(gib=52, config=LLAMA_8B)
    assert not plan.inputs.policy.host_embeddings
    assert planned(config=LLAMA_1B, memory_policy="cuda_graph_max_tokens=512").memory == (
        planned(config=LLAMA_1B, memory_policy="keep").memory
    )


def test_a_checkpoint_holds_weights_copies_and_moments():
    weights = shape().parameters
    assert planned().inputs.checkpoint_bytes == weights * (2 + 4 + 8)
    assert planned(gib=80).inputs.checkpoint_bytes == pytest.approx(weights * 4, rel=0.01)
    assert planned(method="lora", rank=8, examples_per_step=16).inputs.checkpoint_bytes == (
        estimate_memory(planned(method="lora", rank=8).inputs).components[3].size_bytes * 3
    )


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        ({"lr": 2e-4}, "P8", "the learning rate is 0.0002, and every weight trains"),
        ({"rank": 8}, "P8", "method is full, which does not use rank, alpha"),
        ({"targets": "all-linear", "dropout": 0.2}, "P8", "does not use dropout, targets"),
        ({"rows": 500}, "P9", "every weight trains on 500 rows"),
        ({"compute": "fp16"}, "P3", "compute is fp16, and method is full"),
        ({"compute": "fp8", "hardware": CPU, "config": TINY}, "P3", "compute is fp8, and a CPU does not support fp8"),
    ],
)
def test_each_pitfall_of_a_full_run_is_found(flags, code, words):
    found = [finding for finding in planned(**flags).findings if finding.code == code]
    assert any(words in finding.message for finding in found), found
    assert not planned().findings


def test_fp8_shortens_a_step_and_takes_no_more_memory():
    exact, fp8 = (planned(compute=compute, gib=200) for compute in ("auto", "fp8"))
    assert fp8.runnable and not fp8.blocked and not fp8.findings
    assert fp8.memory.peak_bytes == exact.memory.peak_bytes
    steps = [plan_execution(plan.inputs).step_s for plan in (exact, fp8)]
    assert 1.15 < steps[0] / steps[1] < 1.45


def test_a_gpu_without_bf16_computes_in_fp32():
    assert dict(planned("T4", TINY).settings())["compute"] == "fp32"


def test_many_rows_and_the_goal_accuracy_choose_full_fine_tuning_where_it_fits():
    data = facts(rows=200_000)
    plan = make_plan(resolve({}, {"goal": "accuracy"}), data, shape(), hardware_named("H100"))
    assert plan.runnable and plan.settings()["method"] == "full" and plan.settings()["optimizer"] == "adamw_8bit"
    kept = make_plan(resolve({}, {"goal": "accuracy", "method": "lora"}), data, shape(), hardware_named("H100"))
    assert kept.settings()["method"] == "lora"
