import pytest

from lorafit.config import resolve
from lorafit.config.run_config import PLANNED
from lorafit.planning import hardware_named
from lorafit.planning.decisions import decide
from lorafit.planning.hardware import GIB, Hardware
from planning_shapes import GPT2, LLAMA_1B, TINY, facts, shape

CPU = Hardware("a CPU", "cpu", 16 * GIB, cores=2)
LAPTOP = hardware_named("RTX 4060 Laptop")


def decided(hardware=LAPTOP, rows=2_000, config=TINY, changes=None, **flags):
    outcome = decide(resolve({}, flags), facts(rows=rows), shape(config, **(changes or {})), hardware)
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
        (LAPTOP, "bf16", "paged_adamw_8bit"),
        (hardware_named("T4"), "fp16", "paged_adamw_8bit"),
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
    assert values(hardware_named("H100"), config=LLAMA_1B)["gradient_checkpointing"] == "off"
    assert values(LAPTOP.with_memory(5 * GIB), config=LLAMA_1B)["gradient_checkpointing"] == "on"
    assert values(CPU)["gradient_checkpointing"] == "off"


def test_what_was_set_is_kept_and_named():
    outcome = decided(rank=64, quantization="none", gradient_checkpointing="reentrant")
    assert (outcome["rank"].value, outcome["rank"].source) == (64, "flag")
    assert (outcome["alpha"].value, outcome["alpha"].source) == (128, "flag")  # alpha follows a rank that was set
    assert outcome["quantization"].source == "flag"
    assert outcome["gradient_checkpointing"].value == "reentrant"
    assert outcome["compute"].source == "plan"


def test_alpha_follows_the_planned_rank_unless_it_was_set():
    assert values(alpha=7)["alpha"] == 7
    assert values(alpha=7)["rank"] == 8


@pytest.mark.parametrize("key", ["compute", "gradient_checkpointing", "optimizer", "serving"])
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
    outcome = decide(resolved, facts(rows=200_000), shape(TINY), LAPTOP)
    assert outcome.method in ("LoRA", "QLoRA")
