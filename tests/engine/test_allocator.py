"""Blocks that grow: when lorafit asks torch's allocator for them, and what else it leaves alone."""

import os
import subprocess
import sys

import pytest
import torch

from lorafit.engine import PAGE_BYTES, let_blocks_grow, lock_pages_by_threads
from lorafit.engine import runtime as allocator
from lorafit.engine.runtime import VARIABLES, fixed_blocks

GETTER, SETTER = "_accelerator_getAllocatorSettings", "_accelerator_setAllocatorSettings"
GROWING = "expandable_segments:True"
IS_SUPPORTED = allocator._is_supported


class Torch:
    """A GPU's allocator: what it is told, and what a first block does."""

    def __init__(self, monkeypatch):
        self.told, self.settings, self.taken, self.refuses = [], "", [], None
        self.patch = monkeypatch
        for name in VARIABLES:
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(allocator, "_set_here", [])
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(allocator, "_is_supported", lambda: True)
        monkeypatch.setattr(torch._C, GETTER, lambda: self.settings, raising=False)
        monkeypatch.setattr(torch._C, SETTER, self.tell, raising=False)
        monkeypatch.setattr(torch, "empty", self.take)
        monkeypatch.setattr(allocator.platform, "release", lambda: "6.8.0-generic")

    def start_with(self, variable, settings):
        self.patch.setenv(variable, settings)
        self.settings = settings

    def tell(self, settings):
        self.settings = settings
        self.told.append(settings)

    def take(self, size, **_):  # of the GPU, or of the host where it is pinned
        self.taken.append((size, self.settings))
        if self.refuses:
            raise self.refuses


@pytest.fixture
def gpu(monkeypatch):
    return Torch(monkeypatch)


def test_blocks_grow_where_nobody_said_otherwise(gpu):
    let_blocks_grow()
    assert gpu.told == [GROWING]
    assert gpu.taken == [(PAGE_BYTES, GROWING)]  # and one has been seen to


@pytest.mark.parametrize("variable", VARIABLES)
@pytest.mark.parametrize("word", ["True", "False"])
def test_what_the_user_set_stays_whichever_variable_says_it(gpu, variable, word):
    gpu.start_with(variable, f"max_split_size_mb:64,expandable_segments:{word}")
    let_blocks_grow()
    with fixed_blocks():
        pass
    assert gpu.told == [] and gpu.taken == []


def test_what_was_set_while_running_stays_too(gpu):
    gpu.settings = "expandable_segments:False"
    let_blocks_grow()
    assert gpu.told == []


@pytest.mark.parametrize("reads_back", [True, False])
@pytest.mark.parametrize("variable", VARIABLES)
def test_the_users_other_settings_are_kept(gpu, monkeypatch, variable, reads_back):
    gpu.start_with(variable, "garbage_collection_threshold:0.8,roundup_power2_divisions:[256:1,>:2],")
    if not reads_back:
        monkeypatch.delattr(torch._C, GETTER)
    let_blocks_grow()
    kept = "garbage_collection_threshold:0.8,roundup_power2_divisions:[256:1,>:2]"
    assert gpu.told == [f"{kept},{GROWING}"]


def test_another_allocator_is_left_alone(gpu, monkeypatch):
    monkeypatch.setattr(allocator, "available_cores", lambda: 16)
    gpu.start_with(VARIABLES[0], "backend:cudaMallocAsync")
    lock_pages_by_threads()
    let_blocks_grow()
    assert gpu.told == []


def test_without_a_gpu_nothing_is_set(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    let_blocks_grow()
    assert gpu.told == [] and gpu.taken == []


@pytest.mark.parametrize(
    ("system", "kernel", "hip"),
    [("win32", "10", None), ("linux", "6.6.87-microsoft-standard-WSL2", None), ("linux", "6.8.0-generic", "6.4")],
)
def test_where_growing_blocks_are_not_supported_nothing_is_set(gpu, monkeypatch, system, kernel, hip):
    monkeypatch.setattr(allocator, "_is_supported", IS_SUPPORTED)
    monkeypatch.setattr(allocator.sys, "platform", system)
    monkeypatch.setattr(allocator.platform, "release", lambda: kernel)
    monkeypatch.setattr(torch.version, "hip", hip)
    let_blocks_grow()
    assert gpu.told == []


def test_a_setter_that_raises_breaks_no_run(gpu, monkeypatch):
    def refuse(_):
        raise RuntimeError("Unrecognized key")

    monkeypatch.setattr(torch._C, SETTER, refuse)
    let_blocks_grow()
    assert gpu.taken == []


def test_a_setter_that_is_missing_breaks_no_run(gpu, monkeypatch):
    monkeypatch.delattr(torch._C, SETTER)
    monkeypatch.delattr(torch.cuda.memory, "_set_allocator_settings")
    let_blocks_grow()
    assert gpu.taken == []


def test_a_torch_with_the_older_setter_alone_is_told_as_well(gpu, monkeypatch):
    monkeypatch.delattr(torch._C, SETTER)
    monkeypatch.setattr(torch.cuda.memory, "_set_allocator_settings", gpu.tell)
    let_blocks_grow()
    assert gpu.told == [GROWING]


def test_a_driver_that_refuses_growing_blocks_gets_none(gpu):
    gpu.start_with(VARIABLES[0], "max_split_size_mb:64")
    gpu.refuses = RuntimeError("CUDA driver error: operation not supported")
    let_blocks_grow()
    assert gpu.settings == "max_split_size_mb:64,expandable_segments:False"
    let_blocks_grow()  # not asked for again
    assert len(gpu.taken) == 1


@pytest.mark.parametrize("reads_back", [True, False])
def test_blocks_of_a_recording_do_not_grow_and_later_ones_do(gpu, monkeypatch, reads_back):
    if not reads_back:
        monkeypatch.delattr(torch._C, GETTER)
    gpu.start_with(VARIABLES[1], "max_split_size_mb:64")
    let_blocks_grow()
    with pytest.raises(torch.OutOfMemoryError), fixed_blocks():
        assert gpu.settings == "max_split_size_mb:64,expandable_segments:False"
        raise torch.OutOfMemoryError
    assert gpu.settings == f"max_split_size_mb:64,{GROWING}"


def test_a_recording_changes_nothing_where_blocks_do_not_grow(gpu):
    with fixed_blocks():
        assert gpu.told == []
    assert gpu.told == []


BY_THREADS = "pinned_use_cuda_host_register:True,pinned_num_register_threads:{}"


@pytest.mark.parametrize(("processors", "threads"), [(4, 2), (7, 2), (16, 8), (128, 8)])
def test_pages_are_locked_by_threads_and_blocks_still_grow(gpu, monkeypatch, processors, threads):
    monkeypatch.setattr(allocator, "available_cores", lambda: processors)
    lock_pages_by_threads()
    assert gpu.settings == BY_THREADS.format(threads)
    assert gpu.taken == [(PAGE_BYTES, gpu.settings)]
    let_blocks_grow()
    assert gpu.settings == f"{BY_THREADS.format(threads)},{GROWING}"
    with fixed_blocks():
        assert gpu.settings == f"{BY_THREADS.format(threads)},expandable_segments:False"
    told = list(gpu.told)
    lock_pages_by_threads()  # a second run of one process
    let_blocks_grow()
    assert gpu.told == told


@pytest.mark.parametrize(("kernel", "locks"), [("4.18.0-553.el8_10.x86_64", False), ("5.11", False), ("5.12.0", True)])
def test_kernels_whose_locked_pages_move_when_a_process_forks_lock_none_so(gpu, monkeypatch, kernel, locks):
    monkeypatch.setattr(allocator, "available_cores", lambda: 16)
    monkeypatch.setattr(allocator.platform, "release", lambda: kernel)
    lock_pages_by_threads()
    assert bool(gpu.told) is locks


def test_two_processors_lock_pages_as_torch_does(gpu, monkeypatch):
    monkeypatch.setattr(allocator, "available_cores", lambda: 3)
    lock_pages_by_threads()
    assert gpu.told == []


@pytest.mark.parametrize("variable", VARIABLES)
def test_what_a_user_set_about_page_locking_stays_and_other_settings_do_too(gpu, monkeypatch, variable):
    monkeypatch.setattr(allocator, "available_cores", lambda: 16)
    gpu.start_with(variable, "pinned_use_background_threads:True")
    lock_pages_by_threads()
    assert gpu.told == []
    gpu.start_with(variable, "expandable_segments:True")
    lock_pages_by_threads()
    assert gpu.settings == f"expandable_segments:True,{BY_THREADS.format(8)}"
    let_blocks_grow()
    with fixed_blocks():
        pass
    assert gpu.settings == f"expandable_segments:True,{BY_THREADS.format(8)}"


def test_a_driver_that_locks_no_pages_so_is_asked_as_before(gpu, monkeypatch):
    monkeypatch.setattr(allocator, "available_cores", lambda: 16)
    gpu.refuses = RuntimeError("CUDA error: operation not supported")
    lock_pages_by_threads()
    assert gpu.settings == "pinned_use_cuda_host_register:False"


TORCH_ITSELF = """
import torch
from lorafit.engine import runtime as allocator
torch.cuda.is_available, allocator._is_supported, torch.empty = (lambda: True), (lambda: True), (lambda *_, **__: None)
allocator.let_blocks_grow()
print(torch._C._accelerator_getAllocatorSettings())
"""


@pytest.mark.skipif(not hasattr(torch._C, GETTER), reason="this torch does not say how its allocator is set")
def test_torch_itself_takes_the_setting_beside_the_users():
    given = {**os.environ, VARIABLES[0]: "max_split_size_mb:64"}
    ran = subprocess.run([sys.executable, "-c", TORCH_ITSELF], env=given, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == f"max_split_size_mb:64,{GROWING}"


ON_CARD = """
import bitsandbytes, json, torch
from lorafit.engine import let_blocks_grow
from lorafit.engine.runtime import fixed_blocks
before = torch.zeros(64 << 20, dtype=torch.uint8, device="cuda")
let_blocks_grow()
torch.cuda.set_per_process_memory_fraction((1 << 30) / torch.cuda.mem_get_info()[1])
after = torch.ones(256 << 20, dtype=torch.uint8, device="cuda")
with fixed_blocks():
    fixed = torch.ones(512 << 20, dtype=torch.uint8, device="cuda")
try:
    torch.empty(512 << 20, dtype=torch.uint8, device="cuda")
    held = False
except torch.OutOfMemoryError:
    held = True

def grows(tensor):
    for segment in torch.cuda.memory_snapshot():
        if segment["address"] <= tensor.data_ptr() < segment["address"] + segment["total_size"]:
            return segment["is_expandable"]

print(json.dumps([grows(before), grows(after), grows(fixed), held, int(before.max()), int(after.min())]))
"""


@pytest.mark.gpu
def test_on_a_gpu_blocks_grow_from_then_on_and_the_limit_holds():
    """In a process of its own, since the setting is one of the process, and bitsandbytes has started CUDA in it."""
    given = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    ran = subprocess.run([sys.executable, "-c", ON_CARD], env=given, capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines()[-1] == "[false, true, false, true, 0, 1]"
    assert "not supported on this platform" not in ran.stderr
