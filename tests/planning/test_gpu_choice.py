"""The number of GPUs of a run that names none: several where the plan says that they are faster and train the same."""

from dataclasses import replace

import pytest

from lorafit.config import resolve
from lorafit.hardware import hardware_named
from lorafit.planning import choose_gpus, make_plan, most_gpus
from planning_shapes import facts, shape

LONG = facts(rows=64_000, mean=300, longest=600)


def planned(gpus, count=2, name="H200", stats=LONG, gib=None, **flags):
    """The plan of an 8B for `gpus` of `count` such GPUs."""
    hardware = replace(hardware_named(name), count=count, idle_count=count)
    hardware = hardware.with_memory(gib << 30) if gib else hardware
    return make_plan(resolve({}, {**flags, "gpus": gpus}), stats, shape(), hardware)


def chosen(count=2, **given):
    """The decision of a machine with `count` GPUs."""
    return choose_gpus(planned(1, count, **given), planned(count, count, **given))


def test_a_long_run_takes_all_gpus_and_says_how_much_faster():
    decision = chosen(quantization="nf4")
    assert (decision.key, decision.value, decision.source) == ("gpus", 2, "plan")
    assert decision.reason == "2.0x one by the plan"


@pytest.mark.parametrize(
    ("reason", "given"),
    [
        ("2 GPUs would be 0.7x one by the plan", {"stats": facts(rows=60, mean=100, longest=200)}),
        ("deterministic asks for the bits of one GPU", {"deterministic": True}),
        ("the plan for 2 GPUs has errors", {"gib": 4}),
    ],
)
def test_one_gpu_is_taken_where_several_are_no_faster_or_train_otherwise(reason, given):
    decision = chosen(**given)
    assert (decision.value, decision.reason) == (1, reason)


def test_gpus_never_change_what_is_trained():
    decision = choose_gpus(planned(1, quantization="nf4"), planned(2, quantization="none"))
    assert (decision.value, decision.reason) == (1, "2 GPUs would change quantization")


def test_several_gpus_are_taken_where_one_does_not_suffice():
    decision = chosen(method="full", count=8, gib=16)
    assert (decision.value, decision.reason) == (8, "one GPU does not suffice")


def test_gpus_that_differ_or_are_in_use_are_not_taken_unasked():
    two = replace(hardware_named("H200"), count=2)
    assert most_gpus(two, LONG, 16) == 1 and most_gpus(replace(two, idle_count=2), LONG, 16) == 2
    assert most_gpus(replace(two, count=8, idle_count=8), LONG, 4) == 4, "a step has a row for each"
    one = make_plan(resolve({}, {}), LONG, shape(), two)
    assert choose_gpus(one, one).reason == "the 2 visible GPUs differ, or one is in use"
