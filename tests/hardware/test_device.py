import pytest

from lorafit.errors import UsageError
from lorafit.hardware import hardware_named
from lorafit.hardware.device import GIB, find_gpu, from_gpu, generic_gpu


@pytest.mark.parametrize(
    ("written", "gpu"),
    [
        ("RTX 4090", "RTX 4090"),
        ("4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("rtx-3090-ti", "RTX 3090 Ti"),
        ("h100", "H100"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB"),
        ("a100", "A100 40GB"),
        ("A100 80 GB", "A100 80GB"),
        ("Tesla T4", "T4"),
        ("Tesla V100-SXM2-16GB", "V100 16GB"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA RTX A6000", "RTX A6000"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada"),
        ("NVIDIA GeForce RTX 4060 Laptop GPU", "RTX 4060 Laptop"),
        ("NVIDIA GeForce RTX 2070 with Max-Q Design", "RTX 2070 Laptop"),
        ("RTX 4060 Ti 16 GB", "RTX 4060 Ti 16GB"),
        ("NVIDIA GeForce RTX 5090", "RTX 5090"),
        ("b200", "B200"),
    ],
)
def test_a_gpu_is_known_as_people_and_drivers_write_it(written, gpu):
    assert hardware_named(written).name == gpu


@pytest.mark.parametrize(
    ("written", "near"), [("rtx 4095", "RTX 409"), ("h1000", "H100"), ("A1OO", "A"), ("RTX 9999", "RTX"), ("", "")]
)
def test_an_unknown_gpu_is_an_error_with_the_nearest_one(written, near):
    with pytest.raises(UsageError, match=f"did you mean '{near}") as caught:
        hardware_named(written)
    assert "--gpu-memory" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "bf16", "fp8"),
    [("T4", False, False), ("V100", False, False), ("A100", True, False), ("4090", True, True), ("H100", True, True)],
)
def test_precisions_follow_the_generation(name, bf16, fp8):
    gpu = hardware_named(name)
    assert (gpu.bf16, gpu.fp8) == (bf16, fp8)


def test_what_the_driver_keeps_is_not_planned_with():
    assert 23.4 * GIB < hardware_named("RTX 4090").memory_bytes < 23.6 * GIB  # torch reports 23.5 GiB


def test_a_budget_replaces_the_memory_and_nothing_else():
    gpu = hardware_named("H100")
    small = gpu.with_memory(8 * GIB)
    assert small.memory_bytes == 8 * GIB
    assert {**small.to_dict(), "memory_bytes": 0} == {**gpu.to_dict(), "memory_bytes": 0}


def test_a_gpu_outside_the_table_keeps_its_memory_and_says_what_is_assumed():
    gpu = generic_gpu(10 * GIB, (7, 5))
    assert (gpu.memory_bytes, gpu.bf16, gpu.kind) == (10 * GIB, False, "cuda")
    assert "assumed" in gpu.notes[0]


def test_a_name_in_the_table_leads_to_its_own_row():
    from lorafit.hardware.device import GPUS

    for gpu in GPUS:
        for name in (gpu.name, *gpu.aliases):
            assert find_gpu(name) is gpu, name
        assert from_gpu(gpu).name == gpu.name
