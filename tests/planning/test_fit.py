import re

import pytest
import yaml

from lorafit.config import RunConfig
from lorafit.planning import DataFacts, estimate_memory, hardware_named
from lorafit.planning.fit import obstacles, what_would_fit
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
        (LLAMA_8B, 16, {"quantization": "none"}),
        (LLAMA_8B, 8, {}),
        (LLAMA_8B, 8, {"quantization": "none", "gradient_checkpointing": "off"}),
    ],
)
def test_what_the_fix_says_really_fits(config, memory_gib, settings):
    card = H100.with_memory(memory_gib * GIB)
    [finding] = found(card, config, **settings)
    assert (finding.code, finding.severity.value) == ("P0", "error")
    changes = yaml.safe_load("{" + finding.fix.removeprefix("set ").replace(" and ", ", ") + "}")
    mended = {key: {True: "on", False: "off"}.get(value, value) if key == "gradient_checkpointing" else value
              for key, value in changes.items()}  # fmt: skip
    assert mended
    assert not [item for item in found(card, config, **{**settings, **mended}) if item.severity.value == "error"]


def test_a_smaller_micro_batch_is_never_proposed_below_the_longest_row():
    card = H100.with_memory(8 * GIB)
    fix = what_would_fit(RunConfig(), shape(), card, facts(longest=1_500))
    tokens = re.search(r"max_tokens: (\d+)", fix)
    assert tokens is None or int(tokens[1]) >= 1_500


def test_a_base_that_cannot_fit_names_the_memory_and_a_card_that_has_it():
    [finding] = found(hardware_named("RTX 3060 Laptop"), LLAMA_8B)
    assert "smaller base" in finding.fix
    needed = float(re.search(r"([\d.]+) GiB of memory", finding.fix)[1])
    named = hardware_named(re.search(r"a card like '(.+?)'", finding.fix)[1])
    assert named.memory_bytes >= needed * GIB > hardware_named("RTX 3060 Laptop").memory_bytes


def test_a_run_that_may_not_fit_is_a_warning_with_a_way_out():
    needs = estimate_memory(shape(), RunConfig(), H100, facts()).peak_bytes
    [finding] = found(H100.with_memory(round(1.05 * needs)), LLAMA_8B)
    assert (finding.code, finding.severity.value) == ("P0", "warning")
    assert "±10%" in finding.message.replace(" ", "")
    assert finding.fix.startswith("set ")


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
