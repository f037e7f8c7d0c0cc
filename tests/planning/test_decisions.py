import re

import pytest

from lorafit.config import resolve
from lorafit.config.memory_policy import MemoryPolicy
from lorafit.config.run_config import PLANNED
from lorafit.hardware import hardware_named
from lorafit.hardware.device import GIB, Hardware
from lorafit.planning.decisions import decide, speed_in_words
from planning_shapes import GPT2, LLAMA_1B, LLAMA_8B, TINY, facts, inputs, shape

CPU = Hardware("a CPU", "cpu", 16 * GIB, cores=2)
LAPTOP = hardware_named("RTX 4060 Laptop")


def decided(hardware=LAPTOP, rows=2_000, config=TINY, changes=None, **flags):
    resolved = resolve({}, flags)
    outcome = decide(resolved, inputs(resolved.config, facts(rows=rows), shape(config, **(changes or {})), hardware))
    return {decision.key: decision for decision in outcome.decisions}


def values(*arguments, **keywords):
    return {key: decision.value for key, decision in decided(*arguments, **keywords).items()}


def test_every_planned_setting_is_decided_with_a_reason():
    outcome = decided()
    assert set(outcome) == set(PLANNED)
    assert all(decision.reason and decision.source == "plan" for decision in outcome.values())


@pytest.mark.parametrize(
    ("hardware", "compute", "optimizer"),
    [
        (LAPTOP, "bf16", "adamw"),
        (hardware_named("T4"), "fp16", "adamw"),
        (CPU, "fp32", "adamw"),
    ],
)
def test_precision_and_optimizer_follow_the_device(hardware, compute, optimizer):
    outcome = values(hardware)
    assert (outcome["compute"], outcome["optimizer"]) == (compute, optimizer)


@pytest.mark.parametrize(("rows", "rank"), [(100, 8), (20_000, 16), (80_000, 32)])
def test_rank_follows_the_rows_and_alpha_is_twice_the_rank(rows, rank):
    outcome = values(rows=rows)
    assert (outcome["rank"], outcome["alpha"]) == (rank, 2 * rank)


def test_the_base_stays_in_16_bits_only_where_it_fits():
    assert values(hardware_named("H100"), rows=20_000, config=LLAMA_1B)["quantization"] == "none"
    assert values(LAPTOP.with_memory(4 * GIB), rows=20_000, config=LLAMA_1B)["quantization"] == "nf4"


def test_activations_are_recomputed_only_where_they_do_not_fit():
    gpu = hardware_named("H100")
    roomy, tight = (
        MemoryPolicy.parse(values(room, config=LLAMA_1B)["memory_policy"], 16)
        for room in (gpu, gpu.with_memory(3 * GIB))
    )
    assert (roomy.recompute_layers, roomy.recompute_mlp_layers, roomy.offloaded_layers) == (0, 0, 0)
    assert tight.recompute_layers + tight.recompute_mlp_layers + tight.offloaded_layers > 0
    assert values(CPU)["memory_policy"] == "keep"
    assert "offload" not in values(CPU.with_memory(7 * GIB), config=LLAMA_1B)["memory_policy"]


def test_the_decision_about_activations_says_what_it_does_and_what_it_takes():
    outcome = decided(hardware_named("H100").with_memory(8 * GIB), config=LLAMA_8B, max_length=8192)["memory_policy"]
    policy = MemoryPolicy.parse(outcome.value, 32)
    assert f"{policy.recompute_mlp_layers} of 32 layers recompute their feed-forward" in outcome.reason
    assert f"the activations of {policy.offloaded_layers} layers" in outcome.reason
    assert re.search(r"\d+\.\d k tok/s predicted; [67]\.\d GiB ± 10% of 8\.0 GiB$", outcome.reason)


def test_a_step_is_one_micro_batch_where_a_gpu_has_room_for_it():
    outcome = decided(hardware_named("H100"), config=LLAMA_1B, examples_per_step=4)["memory_policy"]
    assert outcome.value == "dequantized_layers=16,micro_tokens=3600,cuda_graph_max_tokens=3600"
    words = (
        "every activation stays on the device, spare memory holds the dequantized weights of 16 of 16 layers, "
        "micro-batches of up to 3,600 tokens run as CUDA graphs, micro-batches have up to 3,600 tokens: "
    )
    assert outcome.reason.startswith(words)


@pytest.mark.parametrize(("asked", "policy"), [("on", "recompute"), ("off", "keep"), ("reentrant", "recompute")])
def test_gradient_checkpointing_decides_about_activations_where_it_is_set(asked, policy):
    outcome = decided(gradient_checkpointing=asked)["memory_policy"]
    assert (outcome.value, outcome.source) == (policy, "flag")


def test_large_moments_are_kept_in_8_bits():
    settings = {"rank": 256, "targets": "all-linear"}
    assert values(hardware_named("H100"), config=LLAMA_1B, **settings)["optimizer"] == "adamw"
    assert values(LAPTOP, config=LLAMA_1B, **settings)["optimizer"] == "paged_adamw_8bit"


def test_layers_are_compiled_where_there_is_a_gpu():
    assert values()["compile"] == "on"
    assert values(CPU)["compile"] == "off"
    assert values(compile="off")["compile"] == "off"


def test_what_was_set_is_kept_and_named():
    outcome = decided(rank=64, quantization="none", memory_policy="recompute")
    assert (outcome["rank"].value, outcome["rank"].source) == (64, "flag")
    assert (outcome["alpha"].value, outcome["alpha"].source) == (128, "flag")  # alpha follows a rank that was set
    assert outcome["quantization"].source == "flag"
    assert (outcome["memory_policy"].value, outcome["memory_policy"].source) == ("recompute", "flag")
    assert outcome["compute"].source == "plan"


def test_alpha_follows_the_planned_rank_unless_it_was_set():
    assert values(alpha=7)["alpha"] == 7
    assert values(alpha=7)["rank"] == 8


@pytest.mark.parametrize("key", ["compute", "memory_policy", "compile", "optimizer", "serving"])
def test_auto_is_resolved_even_when_it_was_typed(key):
    outcome = decided(**{key: "auto"})
    assert outcome[key].value != "auto"
    assert outcome[key].source == "plan"


@pytest.mark.parametrize(("goal", "serving"), [("latency", "merged"), ("tenants", "adapters"), ("balanced", "merged")])
def test_serving_follows_the_goal(goal, serving):
    assert values(goal=goal)["serving"] == serving


def test_a_base_that_is_quantised_already_stays_so():
    settings = {
        "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    }
    outcome = decided(hardware_named("H100"), rows=20_000, changes=settings)
    assert outcome["quantization"].value == "nf4"
    assert "already" in outcome["quantization"].reason


def test_conv1d_layers_are_not_quantised():
    outcome = decided(config=GPT2, targets="c_attn")
    assert outcome["quantization"].value == "none"
    assert "Conv1D" in outcome["quantization"].reason


@pytest.mark.parametrize("setting", [{"rank": 64}, {"alpha": 16}, {"quantization": "nf4"}, {"targets": "qv"}])
def test_who_sets_an_adapter_s_key_gets_an_adapter(setting):
    resolved = resolve({}, {"goal": "accuracy", **setting})
    outcome = decide(resolved, inputs(resolved.config, facts(rows=200_000), shape(TINY), LAPTOP))
    assert outcome.method in ("LoRA", "QLoRA")


def test_a_run_that_cannot_fit_says_that_nothing_needs_less():
    reason = decided(LAPTOP.with_memory(3 * GIB), config=LLAMA_8B)["memory_policy"].reason
    assert reason.endswith("of 3.0 GiB, and no policy needs less")


@pytest.mark.parametrize(("speed", "words"), [(14_912.0, "14.9 k tok/s"), (27.4, "27.4 tok/s"), (999.4, "999 tok/s")])
def test_speeds_are_said_as_people_say_them(speed, words):
    assert speed_in_words(speed) == words


def test_fp8_is_never_planned_and_keeps_the_base_in_4_bits_where_it_was_asked_for():
    assert values(hardware_named("H100"), rows=20_000, config=LLAMA_1B)["compute"] == "bf16"
    outcome = decided(hardware_named("H100"), rows=20_000, config=LLAMA_1B, compute="fp8")
    assert (outcome["quantization"].value, outcome["quantization"].source) == ("nf4", "plan")
    assert "fp8" in outcome["quantization"].reason


@pytest.mark.parametrize(
    ("gpu", "rows", "settings", "offered"),
    [("H100", 2_000, {}, True), ("A100 40GB", 2_000, {}, False), ("H100", 20_000, {"quantization": "none"}, False)],
)
def test_fp8_is_offered_where_the_gpu_has_it_and_the_base_is_in_4_bits(gpu, rows, settings, offered):
    reason = decided(hardware_named(gpu), rows=rows, config=LLAMA_8B, **settings)["compute"].reason
    assert ("compute=fp8" in reason) is offered


def test_a_cpu_keeps_everything_in_whole_micro_batches_where_that_fits():
    assert values(CPU)["memory_policy"] == "keep"
