import re

import pytest
import yaml

from lorafit.config import RunConfig
from lorafit.planning import DataFacts, estimate_memory, hardware_named
from lorafit.planning.fit import obstacles
from lorafit.planning.hardware import GIB, Hardware
from planning_shapes import GPT2, LLAMA_1B, LLAMA_8B, TINY, facts, shape

H100 = hardware_named("H100")
CPU = Hardware("a CPU", "cpu", 16 * GIB, cores=2)
NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


def found(hardware=H100, config=TINY, data=None, changes=None, **settings):
    run, model, data = RunConfig(**settings), shape(config, **(changes or {})), data or facts()
    memory = estimate_memory(model, run, hardware, data)
    return list(obstacles(run, model, hardware, memory, data))


def codes(*arguments, **keywords):
    return [(finding.code, finding.severity.value) for finding in found(*arguments, **keywords)]


def test_a_run_that_fits_has_no_obstacle():
    assert codes() == []


@pytest.mark.parametrize(
    ("config", "memory_gib", "settings"),
    [
        (LLAMA_1B, 4, {"gradient_checkpointing": "off"}),
        (LLAMA_8B, 12, {"quantization": "none"}),
        (LLAMA_8B, 8, {"activations": "keep"}),
        (LLAMA_8B, 8, {"activations": "feed_forward=4", "max_tokens": 8192}),
        (LLAMA_8B, 10, {"quantization": "none", "gradient_checkpointing": "off"}),
    ],
)
def test_what_the_fix_says_really_fits(config, memory_gib, settings):
    card = H100.with_memory(memory_gib * GIB)
    [finding] = found(card, config, **settings)
    assert (finding.code, finding.severity.value) == ("P0", "error")
    changes = yaml.safe_load("{" + finding.fix.removeprefix("set ").replace(" and ", ", ") + "}")
    assert changes
    assert found(card, config, **{**settings, **changes}) == []


def test_activations_on_auto_make_8b_fit_where_no_setting_by_hand_would():
    assert codes(H100.with_memory(7 * GIB), LLAMA_8B, max_tokens=8192) == []
    assert codes(H100.with_memory(7 * GIB), LLAMA_8B, max_tokens=8192, activations="recompute") == [("P0", "error")]


def test_a_base_that_cannot_fit_names_the_memory_and_a_card_that_has_it():
    [finding] = found(hardware_named("RTX 3050 Laptop"), LLAMA_8B)
    assert "smaller base" in finding.fix
    needed = float(re.search(r"([\d.]+) GiB of memory", finding.fix)[1])
    named = hardware_named(re.search(r"a card like '(.+?)'", finding.fix)[1])
    assert named.memory_bytes >= 0.99 * needed * GIB > hardware_named("RTX 3050 Laptop").memory_bytes


def test_a_run_that_may_not_fit_is_a_warning_with_a_way_out():
    needs = estimate_memory(shape(), RunConfig(activations="keep"), H100, facts()).peak_bytes
    [finding] = found(H100.with_memory(round(1.05 * needs)), LLAMA_8B, activations="keep")
    assert (finding.code, finding.severity.value) == ("P0", "warning")
    assert "±10%" in finding.message.replace(" ", "")
    assert finding.fix == "set activations: auto"


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "mxfp4"])
def test_a_base_quantised_in_another_way_cannot_be_frozen(method):
    assert codes(changes={"quantization_config": {"quant_method": method}}) == [("P0", "error")]


def test_a_4_bit_base_cannot_be_loaded_in_16_bits():
    assert codes(changes={"quantization_config": NF4}) == []
    assert codes(changes={"quantization_config": NF4}, quantization="none") == [("P0", "error")]


def test_conv1d_is_said_not_to_be_supported_in_4_bits():
    [finding] = found(config=GPT2, targets=("c_attn",))
    assert "Conv1D" in finding.message
    assert "not supported in 4 bits" in finding.message
    assert codes(config=GPT2, targets=("c_attn",), quantization="none") == []


def test_rows_beyond_learned_positions_stop_the_run_and_others_warn():
    long_rows = DataFacts(100, 200_000, 100_000, 2_000, 2_000.0)
    assert codes(config=GPT2, data=long_rows, targets=("c_attn",), quantization="none") == [("P0", "error")]
    assert codes(data=long_rows, changes={"max_position_embeddings": 1_024}) == [("P0", "warning")]


@pytest.mark.parametrize("optimizer", ["adamw_8bit", "paged_adamw_8bit"])
def test_an_8_bit_optimizer_without_cuda_stops_the_run(optimizer):
    assert codes(CPU, optimizer=optimizer) == [("P0", "error")]
    assert codes(H100, optimizer=optimizer) == []
    assert codes(CPU) == []
