import json
import subprocess
import sys

import pytest

from lorafit.config import resolve
from lorafit.config.run_config import PLANNED
from lorafit.findings import Finding
from lorafit.hardware import hardware_named
from lorafit.hardware.device import GIB, Hardware
from lorafit.memory import DataStats
from lorafit.planning import make_plan
from planning_shapes import LLAMA_8B, PHI3, TINY, facts, shape

CPU = Hardware("a CPU", "cpu", 16 * GIB, cores=2, usd_per_hour=(0.04, 0.10))
H100 = hardware_named("H100")


def planned(hardware=H100, rows=2_000, config=LLAMA_8B, data=None, **flags):
    resolved = resolve({}, flags)
    return resolved, make_plan(resolved, data or facts(rows=rows), shape(config), hardware)


@pytest.mark.parametrize(
    ("hardware", "rows", "config", "method"),
    [
        (H100, 2_000, LLAMA_8B, "QLoRA"),
        (H100, 20_000, LLAMA_8B, "LoRA"),
        (hardware_named("RTX 4080"), 20_000, LLAMA_8B, "QLoRA"),
        (CPU, 20_000, TINY, "LoRA"),
        (CPU, 500, TINY, "QLoRA"),
    ],
)
def test_the_plan_names_its_method_and_fits(hardware, rows, config, method):
    _, plan = planned(hardware, rows, config)
    assert plan.method == method
    assert plan.fits
    assert not plan.blocked
    assert plan.targets == ("q_proj", "v_proj")


def test_the_settings_are_the_planned_keys_and_the_run_config_takes_them():
    resolved, plan = planned()
    assert set(plan.settings()) == set(PLANNED)
    final = resolved.planned(plan.settings())
    assert final.config.rank == 8
    assert final.config.compute == "bf16"
    assert final.sources["rank"] == "plan"
    assert "auto" not in {getattr(final.config, key) for key in PLANNED}


def test_what_was_set_survives_the_plan_and_is_judged():
    resolved, plan = planned(rank=64, dropout=0.3)
    assert resolved.planned(plan.settings()).config.rank == 64
    assert [finding.code for finding in plan.findings] == ["P4", "P7"]


def test_findings_can_be_left_out_but_not_what_cannot_finish():
    _, quiet = planned(rank=64, dropout=0.3, ignore=("P",))
    assert quiet.findings == ()
    _, tight = planned(hardware_named("RTX 3050 Laptop"), ignore=("P",))
    assert [finding.code for finding in tight.findings] == ["P0"]
    assert tight.blocked


def test_the_plan_counts_what_trains_and_how_long():
    _, plan = planned()
    assert plan.trainable_parameters == 32 * 8 * (4096 + 4096 + 4096 + 1024)
    assert plan.steps == 375
    assert 0 < plan.time_s[0] < plan.time_s[1]
    assert 0 < plan.cost_usd[0] < plan.cost_usd[1]
    assert plan.time_assumes


def test_full_fine_tuning_beyond_one_gpu_is_planned_but_not_run():
    _, plan = planned(hardware_named("RTX 3060"), rows=200_000, goal="accuracy")
    assert plan.method == "full fine-tuning"
    assert not plan.runnable
    assert plan.reason
    assert plan.blocked
    assert plan.gpus >= 2
    assert plan.trainable_parameters == 8_030_261_248
    assert dict(plan.settings())["compute"] == "bf16"
    assert [(finding.code, finding.where) for finding in plan.findings] == [("P0", "method")]


def test_a_fused_projection_is_planned_with_a_note():
    _, plan = planned(config=PHI3)
    assert plan.targets == ("qkv_proj",)
    assert any("'qv' adapts the whole of qkv_proj" in note for note in plan.notes)


def test_the_plan_is_json_ready_and_its_findings_come_back():
    _, plan = planned(rank=64)
    fields = json.loads(json.dumps(plan.to_dict()))
    assert fields["method"] == "QLoRA"
    assert {decision["key"] for decision in fields["decisions"]} == set(PLANNED)
    assert [Finding.from_dict(finding) for finding in fields["findings"]] == list(plan.findings)
    assert fields["options"][2]["chosen"]


def test_the_same_input_gives_the_same_plan():
    assert planned()[1].to_dict() == planned()[1].to_dict()


def test_no_rows_at_all_is_planned_without_a_crash():
    _, plan = planned(data=DataStats(0, 0, 0, 0, 0.0))
    assert plan.method == "QLoRA"


def test_planning_imports_neither_torch_nor_transformers():
    code = "import sys, lorafit.planning; print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
