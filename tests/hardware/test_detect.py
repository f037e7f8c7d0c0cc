import pytest

from lorafit.config import RunConfig
from lorafit.errors import UsageError
from lorafit.hardware import detect
from lorafit.hardware.device import GIB

H200 = "0, GPU-8c3c, NVIDIA H200, 143771, 143156, 9.0"
TWO = H200 + "\n1, GPU-77aa, NVIDIA GeForce RTX 3060, 12288, 6000, 8.6\n"


@pytest.fixture
def smi(monkeypatch):
    """Pretend that nvidia-smi prints a text, and that torch has CUDA."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(detect, "_torch_version", lambda: "2.13.0+cu130")

    def pretend(text):
        monkeypatch.setattr(detect, "_nvidia_smi", lambda: detect.parse_nvidia_smi(text))

    return pretend


def test_the_gpu_is_the_one_nvidia_smi_names_with_what_is_free_on_it(smi):
    smi(H200)
    gpu = detect.detect_hardware()
    assert (gpu.name, gpu.kind, gpu.capability) == ("NVIDIA H200", "cuda", (9, 0))
    assert gpu.memory_bytes == 143156 << 20
    assert (gpu.bf16, gpu.fp8, gpu.count) == (True, True, 1)
    assert gpu.tflops_bf16 == 989


@pytest.mark.parametrize(
    ("visible", "name", "count"),
    [
        ("1", "NVIDIA GeForce RTX 3060", 1),
        ("1,0", "NVIDIA GeForce RTX 3060", 2),
        ("GPU-77", "NVIDIA GeForce RTX 3060", 1),
        ("0,7,1", "NVIDIA H200", 1),
    ],
)
def test_cuda_visible_devices_is_respected(smi, monkeypatch, visible, name, count):
    smi(TWO)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    gpu = detect.detect_hardware()
    assert (gpu.name, gpu.count) == (name, count)


@pytest.mark.parametrize(
    ("second", "idle"), [(H200, 2), (H200.replace("143156", "90000"), 1), (TWO.splitlines()[1], 1)]
)
def test_gpus_that_are_alike_and_free_may_be_taken_unasked(smi, second, idle):
    smi(f"{H200}\n1{second[1:]}")
    gpu = detect.detect_hardware()
    assert (gpu.count, gpu.idle_count) == (2, idle)


@pytest.mark.parametrize("visible", ["", "-1", "5", "NoDevFiles"])
def test_hidden_gpus_leave_the_processor(smi, monkeypatch, visible):
    smi(TWO)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert detect.detect_hardware().kind == "cpu"


def test_memory_that_others_take_is_said(smi):
    smi(TWO.splitlines()[1])
    gpu = detect.detect_hardware()
    assert gpu.memory_bytes == 6000 << 20
    assert "6.1 GiB of the GPU are taken" in gpu.notes[-1]


def test_a_gpu_that_says_little_is_still_planned_for(smi):
    smi("0, GPU-1, NVIDIA GB10, [N/A], [N/A], 12.1")
    gpu = detect.detect_hardware()
    assert (gpu.kind, gpu.capability, gpu.fp8) == ("cuda", (12, 1), True)


def test_a_torch_without_cuda_makes_it_a_cpu_run_and_says_so(smi, monkeypatch):
    smi(H200)
    monkeypatch.setattr(detect, "_torch_version", lambda: "2.13.0+cpu")
    device = detect.detect_hardware()
    assert device.kind == "cpu"
    assert "built without CUDA" in device.notes[0]


@pytest.mark.parametrize(
    "text", ["", "NVIDIA-SMI has failed because it couldn't communicate", "0, GPU", "a\n\x00,,,,,"]
)
def test_what_is_no_list_of_gpus_leaves_the_processor(smi, text):
    smi(text)
    assert detect.detect_hardware().kind == "cpu"


def test_the_processor_has_a_name_cores_and_memory():
    device = detect.detect_processor()
    assert device.kind == "cpu"
    assert device.name
    assert device.cores >= 1
    assert device.memory_bytes > 64 << 20
    assert device.tflops_bf16 > 0


def test_a_container_s_limits_are_the_machine_s(monkeypatch):
    files = {
        "/proc/meminfo": ["MemTotal: 65536000 kB", "MemAvailable: 60000000 kB"],
        "/sys/fs/cgroup/memory.max": [str(4 * GIB)],
        "/sys/fs/cgroup/memory.current": [str(GIB)],
        "/sys/fs/cgroup/cpu.max": ["150000 100000"],
    }
    monkeypatch.setattr(detect, "_lines", lambda path: files.get(path, []))
    device = detect.detect_processor()
    assert device.memory_bytes == 3 * GIB
    assert device.cores == 1


@pytest.mark.parametrize(
    ("root", "limit", "used", "key"),
    [
        ("", "memory.max", "memory.current", "inactive_file"),
        ("memory/", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ],
)
def test_files_that_a_container_has_read_give_way(monkeypatch, root, limit, used, key):
    files = {
        "/proc/meminfo": ["MemAvailable: 60000000 kB"],
        f"/sys/fs/cgroup/{root}{limit}": [str(8 * GIB)],
        f"/sys/fs/cgroup/{root}{used}": [str(7 * GIB)],
        f"/sys/fs/cgroup/{root}memory.stat": ["anon 1", f"{key} {5 * GIB}", "total_rss 3"],
    }
    monkeypatch.setattr(detect, "_lines", lambda path: files.get(path, []))
    assert detect.available_bytes() == 6 * GIB


def test_an_unlimited_container_is_no_limit(monkeypatch):
    files = {
        "/proc/meminfo": ["MemAvailable: 1048576 kB"],
        "/sys/fs/cgroup/memory.max": ["max"],
        "/sys/fs/cgroup/cpu.max": ["max 100000"],
    }
    monkeypatch.setattr(detect, "_lines", lambda path: files.get(path, []))
    assert detect.detect_processor().memory_bytes == GIB


def test_a_named_gpu_and_a_budget_are_planned_for_instead_of_the_machine(smi):
    smi(H200)
    assert detect.hardware_for(RunConfig(gpu="RTX 4090", gpu_memory="8GiB")).to_dict()["name"] == "RTX 4090"
    assert detect.hardware_for(RunConfig(gpu="RTX 4090", gpu_memory="8GiB")).memory_bytes == 8 * GIB
    assert detect.hardware_for(RunConfig(gpu_memory="8GiB")).name == "NVIDIA H200"
    assert detect.hardware_for(RunConfig(gpu="cpu")).kind == "cpu"
    with pytest.raises(UsageError, match="unknown GPU ''"):
        detect.hardware_for(RunConfig(gpu=""))
    with pytest.raises(UsageError, match="unknown GPU"):
        detect.hardware_for(RunConfig(gpu="abacus"))


def test_no_budget_is_larger_than_the_gpu(smi):
    smi(TWO.splitlines()[1])
    assert detect.hardware_for(RunConfig(gpu_memory="80GiB")).memory_bytes == 6000 << 20
    assert detect.hardware_for(RunConfig(gpu="RTX 4090", gpu_memory="80GiB")) == detect.hardware_for(
        RunConfig(gpu="4090")
    )
    assert detect.hardware_for(RunConfig(gpu="cpu", gpu_memory="80000GiB")).memory_bytes < 80_000 * GIB


def test_a_budget_without_a_gpu_means_a_gpu_of_that_size(smi):
    smi("")
    gpu = detect.hardware_for(RunConfig(gpu_memory="8GiB"))
    assert (gpu.kind, gpu.memory_bytes) == ("cuda", 8 * GIB)


def test_a_run_here_has_the_device_here_whatever_is_planned_for(smi):
    smi(H200)
    assert detect.hardware_here(RunConfig(gpu="T4")).name == "NVIDIA H200"
    assert detect.hardware_here(RunConfig(gpu_memory="8GiB")).memory_bytes == 8 * GIB
    smi("")
    assert detect.hardware_here(RunConfig(gpu_memory="8000GiB")).kind == "cpu"
    assert detect.hardware_here(RunConfig(gpu_memory="8000GiB")).memory_bytes < 8000 * GIB
