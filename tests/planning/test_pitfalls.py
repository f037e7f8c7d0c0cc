import pytest

from lorafit.config import RunConfig
from lorafit.hardware import hardware_named
from lorafit.hardware.device import GIB, Hardware
from lorafit.memory import PlanInputs, estimate_memory
from lorafit.planning import pitfalls
from planning_shapes import TINY, facts, shape

CPU = Hardware("a CPU", "cpu", 16 * GIB, cores=2)
H100 = hardware_named("H100")
GOOD = {"rank": 8, "alpha": 16.0, "memory_policy": "recompute", "compute": "bf16", "serving": "merged"}


def found(hardware=H100, rows=2_000, config=TINY, **settings):
    run, model, data = RunConfig(**{**GOOD, **settings}), shape(config), facts(rows=rows)
    memory = estimate_memory(PlanInputs(run, data, model, hardware))
    return pitfalls(PlanInputs(run, data, model, hardware), memory)


def codes(*arguments, **keywords):
    return [(finding.code, finding.severity.value) for finding in found(*arguments, **keywords)]


def test_a_good_run_has_no_pitfall():
    assert found() == []


@pytest.mark.parametrize(
    ("targets", "bad"), [(("up_proj", "down_proj"), True), (("o_proj",), False), ("all-linear", False), ("qv", False)]
)
def test_p1_no_attention_projection_among_the_targets(targets, bad):
    assert codes(targets=targets) == ([("P1", "warning")] if bad else [])


@pytest.mark.parametrize(
    ("activations", "named"),
    [
        ("offload", "offloaded_layers"),
        (
            "dequantized_layers=2,cuda_graph_max_tokens=64,host_embeddings=on",
            "dequantized_layers, cuda_graph_max_tokens, host_embeddings",
        ),
        ("keep", ""),
    ],
)
def test_p2_a_policy_of_which_a_cpu_has_no_use(activations, named):
    settings = {"memory_policy": activations, "compute": "fp32"}
    messages = [finding.message for finding in found(CPU, **settings) if finding.code == "P2"]
    assert messages == ([f"memory_policy sets {named}, which a CPU does not use"] if named else [])
    assert "P2" not in [code for code, _ in codes(H100, **(settings | {"compute": "bf16"}))]


def test_p2_checkpointing_off_where_activations_do_not_fit():
    assert codes(memory_policy="keep") == []
    tight = H100.with_memory(round(0.9 * GIB))
    assert codes(tight, memory_policy="keep") == [("P2", "error")]
    finding = found(tight, memory_policy="keep")[0]
    assert "921.6 MiB" in finding.message
    assert finding.fix.startswith("set memory_policy: auto")


@pytest.mark.parametrize(("activations", "bad"), [("keep", True), ("auto", False), ("recompute", False)])
def test_p2_activations_kept_where_they_do_not_fit(activations, bad):
    tight = H100.with_memory(round(0.9 * GIB))
    settings = {"memory_policy": activations}
    assert codes(tight, **settings) == ([("P2", "error")] if bad else [])
    assert not bad or found(tight, **settings)[0].where == "memory_policy"


@pytest.mark.parametrize(
    ("hardware", "settings", "expected"),
    [
        (H100, {"compute": "fp32"}, [("P3", "warning")]),
        (H100, {"compute": "fp32", "quantization": "none"}, []),
        (hardware_named("T4"), {"compute": "bf16"}, [("P3", "error")]),
        (hardware_named("T4"), {"compute": "fp16"}, []),
        (hardware_named("RTX 3090"), {"compute": "fp8"}, [("P3", "error")]),
        (CPU, {"compute": "fp8"}, [("P3", "error")]),
        (H100, {"compute": "fp8"}, []),
        (H100, {"compute": "fp8", "quantization": "none"}, [("P3", "error")]),
        (hardware_named("RTX 4090"), {"compute": "fp8"}, []),
        (CPU, {"compute": "fp32"}, []),
        (CPU, {"compute": "bf16"}, [("P3", "warning")]),
        (CPU, {"compute": "fp16"}, [("P3", "warning")]),
    ],
)
def test_p3_precision_that_the_base_or_the_hardware_does_not_want(hardware, settings, expected):
    assert codes(hardware, **settings) == expected


@pytest.mark.parametrize(("dropout", "bad"), [(0.0, False), (0.1, False), (0.11, True), (0.5, True)])
def test_p4_dropout_above_a_tenth(dropout, bad):
    assert codes(dropout=dropout) == ([("P4", "warning")] if bad else [])


@pytest.mark.parametrize(
    ("goal", "serving", "bad"),
    [("latency", "adapters", True), ("latency", "merged", False), ("tenants", "adapters", False)],
)
def test_p6_unmerged_adapters_where_latency_counts(goal, serving, bad):
    assert codes(goal=goal, serving=serving) == ([("P6", "warning")] if bad else [])


@pytest.mark.parametrize(
    ("rows", "rank", "bad"),
    [
        (4_999, 8, False),
        (4_999, 9, True),
        (5_000, 16, False),
        (5_000, 17, True),
        (50_000, 16, False),
        (50_001, 32, False),
        (50_001, 33, True),
    ],
)
def test_p7_a_rank_that_the_rows_cannot_fill(rows, rank, bad):
    assert codes(rows=rows, rank=rank) == ([("P7", "warning")] if bad else [])


def test_every_pitfall_names_what_it_saw_why_it_matters_and_the_fix():
    everything = found(
        hardware_named("T4").with_memory(GIB // 2), targets=("up_proj",), memory_policy="keep", dropout=0.5,
        goal="latency", serving="adapters", rank=256,
    )  # fmt: skip
    assert [finding.code for finding in everything] == ["P1", "P2", "P3", "P4", "P6", "P7"]
    for finding in everything:
        assert finding.message
        assert finding.why
        assert finding.fix
        assert finding.where in RunConfig.model_fields
