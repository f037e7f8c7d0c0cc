import re

import pytest
import yaml

from lorafit.config import RunConfig
from lorafit.hardware import hardware_named
from lorafit.hardware.device import GIB, Hardware
from lorafit.memory import DataStats, PlanInputs, estimate_memory
from lorafit.planning.pitfalls import obstacles
from planning_shapes import GPT2, LLAMA_1B, LLAMA_8B, TINY, facts, shape

H100 = hardware_named("H100")
CPU = Hardware("a CPU", "cpu", 16 * GIB, cores=2)
NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


def found(hardware=H100, config=TINY, data=None, changes=None, **settings):
    run, model, data = RunConfig(**settings), shape(config, **(changes or {})), data or facts()
    memory = estimate_memory(PlanInputs(run, data, model, hardware))
    return list(obstacles(PlanInputs(run, data, model, hardware), memory))


def codes(*arguments, **keywords):
    return [(finding.code, finding.severity.value) for finding in found(*arguments, **keywords)]


def test_a_run_that_fits_has_no_obstacle():
    assert codes() == []


@pytest.mark.parametrize(
    ("config", "memory_gib", "settings"),
    [
        (LLAMA_1B, 3, {"memory_policy": "keep"}),
        (LLAMA_8B, 12, {"quantization": "none"}),
        (LLAMA_8B, 8, {"memory_policy": "keep"}),
        (LLAMA_8B, 8, {"memory_policy": "recompute_mlp_layers=4", "max_length": 8192}),
        (LLAMA_8B, 10, {"quantization": "none", "memory_policy": "keep"}),
    ],
)
def test_what_the_fix_says_really_fits(config, memory_gib, settings):
    gpu = H100.with_memory(memory_gib * GIB)
    [finding] = found(gpu, config, **settings)
    assert (finding.code, finding.severity.value) == ("P0", "error")
    changes = yaml.safe_load("{" + finding.fix.removeprefix("set ").replace(" and ", ", ") + "}")
    assert changes
    assert found(gpu, config, **{**settings, **changes}) == []


def test_activations_on_auto_make_8b_fit_where_no_setting_by_hand_would():
    assert codes(H100.with_memory(7 * GIB), LLAMA_8B, max_length=8192) == []
    assert codes(H100.with_memory(7 * GIB), LLAMA_8B, max_length=8192, memory_policy="recompute") == [("P0", "error")]


@pytest.mark.parametrize("gib", [3, 4, 5, 5.8, 6])
def test_the_memory_and_the_gpu_that_are_advised_are_enough_with_the_error_to_spare(gib):
    """8B needs 5.6 GiB, give or take a tenth: neither a budget of 6 nor a GPU of 6 GB is a promise."""
    [finding] = found(H100.with_memory(int(gib * GIB)), LLAMA_8B)
    advised = float(re.search(r"([\d.]+) GiB of memory", finding.fix)[1])
    gpu = hardware_named(re.search(r"a GPU like '(.+?)'", finding.fix)[1])
    assert gib < advised
    assert found(H100.with_memory(int(advised * GIB)), LLAMA_8B) == found(gpu, LLAMA_8B) == []


def test_a_processor_s_advice_is_enough_too_though_more_memory_also_holds_more():
    [finding] = found(Hardware("a CPU", "cpu", 4 * GIB, cores=2), LLAMA_8B)
    advised = float(re.search(r"([\d.]+) GiB of memory", finding.fix)[1])
    assert found(Hardware("a CPU", "cpu", int(advised * GIB), cores=2), LLAMA_8B) == []


@pytest.mark.parametrize(("compute", "able"), [("bf16", "bf16"), ("fp8", "fp8")])
def test_a_gpu_that_is_advised_has_the_precision_of_the_run(compute, able):
    [finding] = found(H100.with_memory(5 * GIB), LLAMA_8B, compute=compute)
    assert getattr(hardware_named(re.search(r"a GPU like '(.+?)'", finding.fix)[1]), able)


@pytest.mark.parametrize(
    ("gpu_memory", "gib", "said"),
    [
        ("5GiB", 5, "and gpu_memory allows 5.0 GiB"),
        ("1KiB", 2**-20, "and gpu_memory allows 1.0 KiB"),
        (None, 5, "and H100 has 5.0 GiB"),
    ],
)
def test_a_budget_is_not_said_to_be_all_that_the_gpu_has(gpu_memory, gib, said):
    [finding] = found(H100.with_memory(int(gib * GIB)), LLAMA_8B, gpu_memory=gpu_memory)
    assert finding.message.endswith(said)


def test_a_budget_beyond_the_gpu_is_said_once_and_adds_nothing():
    [finding] = found(hardware_named("RTX 4090"), gpu_memory="80GiB")
    assert (finding.code, finding.severity.value, finding.where) == ("P0", "warning", "gpu_memory")
    assert finding.message == "gpu_memory is 80.0 GiB, and RTX 4090 has 23.5 GiB"
    assert found(hardware_named("RTX 4090"), gpu_memory="23GiB") == []
    messages = [finding.message for finding in found(hardware_named("RTX 3050 Laptop"), LLAMA_8B, gpu_memory="80GiB")]
    assert [message.endswith("RTX 3050 Laptop has 3.9 GiB") for message in messages] == [True, True]


def test_a_base_that_cannot_fit_names_the_memory_and_a_gpu_that_has_it():
    [finding] = found(hardware_named("RTX 3050 Laptop"), LLAMA_8B)
    assert "smaller base" in finding.fix
    needed = float(re.search(r"([\d.]+) GiB of memory", finding.fix)[1])
    named = hardware_named(re.search(r"a GPU like '(.+?)'", finding.fix)[1])
    assert named.memory_bytes >= 0.99 * needed * GIB > hardware_named("RTX 3050 Laptop").memory_bytes


def test_a_run_that_may_not_fit_is_a_warning_with_a_way_out():
    needs = estimate_memory(PlanInputs(RunConfig(memory_policy="keep"), facts(), shape(), H100)).peak_bytes
    [finding] = found(H100.with_memory(round(1.05 * needs)), LLAMA_8B, memory_policy="keep")
    assert (finding.code, finding.severity.value) == ("P0", "warning")
    assert "±10%" in finding.message.replace(" ", "")
    assert finding.fix == "set memory_policy: auto"


@pytest.mark.parametrize("method", ["gptq", "awq", "compressed-tensors"])
def test_a_base_quantised_in_another_way_cannot_be_frozen(method):
    assert codes(changes={"quantization_config": {"quant_method": method}}) == [("P0", "error")]


@pytest.mark.parametrize("method", ["fp8", "mxfp4"])
def test_a_base_published_in_fp8_or_mxfp4_is_planned_as_its_16_bit_model(method):
    assert codes(changes={"quantization_config": {"quant_method": method}}) == []


def test_a_4_bit_base_cannot_be_loaded_in_16_bits():
    assert codes(changes={"quantization_config": NF4}) == []
    assert codes(changes={"quantization_config": NF4}, quantization="none") == [("P0", "error")]


def test_conv1d_is_said_not_to_be_supported_in_4_bits():
    [finding] = found(config=GPT2, targets=("c_attn",))
    assert "Conv1D" in finding.message
    assert "not supported in 4 bits" in finding.message
    assert codes(config=GPT2, targets=("c_attn",), quantization="none") == []


def test_rows_beyond_learned_positions_stop_the_run_and_others_warn():
    long_rows = DataStats(100, 200_000, 100_000, 2_000, 2_000.0)
    assert codes(config=GPT2, data=long_rows, targets=("c_attn",), quantization="none") == [("P0", "error")]
    assert codes(data=long_rows, changes={"max_position_embeddings": 1_024}) == [("P0", "warning")]


@pytest.mark.parametrize("optimizer", ["adamw_8bit", "paged_adamw_8bit"])
def test_an_8_bit_optimizer_without_cuda_stops_the_run(optimizer):
    assert codes(CPU, optimizer=optimizer) == [("P0", "error")]
    assert codes(H100, optimizer=optimizer) == []
    assert codes(CPU) == []


def test_who_set_a_budget_is_told_the_one_that_does_and_not_another_gpu():
    [finding] = found(H100.with_memory(4 * GIB), LLAMA_8B, gpu_memory="4GiB")
    advised = re.search(r"or gpu_memory: ([\d.]+)GiB$", finding.fix)[1]
    enough = H100.with_memory(int(float(advised) * GIB))
    assert found(enough, LLAMA_8B, gpu_memory=f"{advised}GiB") == []
