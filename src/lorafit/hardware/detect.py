"""Detection: the GPU or the CPU of this machine, found without torch."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil  # type: ignore[import-untyped]

from lorafit.config import RunConfig, parse_bytes
from lorafit.errors import UsageError
from lorafit.hardware.device import CORE_PEAK_GFLOPS, Hardware, find_gpu, from_gpu, generic_gpu, hardware_named

QUERY = "index,uuid,name,memory.total,memory.free,compute_cap"
TIMEOUT_S = 20
CORE_USD_PER_HOUR = (0.02, 0.05)
"""ASSUMED price (low, high) of one cloud CPU core in USD an hour."""
PINNED_SHARE = 0.5
"""Share of the host's free memory that activations may pin. Pinned memory cannot be paged out."""
CGROUP_MEMORY = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
)
"""Files of a container's memory in cgroup v2 and v1. They are limit, use, and statistics with the field of idle file
cache. The kernel frees idle file cache on demand, so it does not count as used."""


@dataclass(frozen=True, slots=True)
class VisibleGpu:
    """Hold one line of nvidia-smi.

    Attributes:
        index: Index of the GPU.
        uuid: UUID of the GPU.
        name: Name that the driver gives it.
        total_mib: Memory in MiB; None when the driver does not report it.
        free_mib: Free memory in MiB; None when the driver does not report it.
        capability: CUDA compute capability; None when the driver does not report it.
    """

    index: str
    uuid: str
    name: str
    total_mib: int | None
    free_mib: int | None
    capability: tuple[int, int] | None

    @property
    def is_idle(self) -> bool:
        """False when other programs or the driver have a tenth of the memory, as far as the driver reports it."""
        return self.free_mib is None or not self.total_mib or self.free_mib >= 0.9 * self.total_mib


def hardware_for(config: RunConfig) -> Hardware:
    """Return the device to plan for, within `config.gpu_memory`.

    It is the GPU named by `config.gpu`, else the detected one. On a machine without a GPU, `gpu_memory` stands for a
    GPU of that size. Raises UsageError for an unknown GPU, and for a number of GPUs that cannot be.
    """
    device = _device_for(config)
    if config.gpus is None or config.gpus == "all":
        return device
    if config.gpus > 1 and device.kind == "cpu":
        fix = f"name the GPU: gpu: {config.gpus} x RTX 4090"
        raise UsageError("there is no GPU here to plan several of", where="gpus", fix=fix)
    if config.gpu and device.count not in (1, config.gpus):
        what = f"gpu names {device.count} GPUs, and gpus is {config.gpus}"
        raise UsageError(what, where="gpus", fix="leave gpus out")
    return device


def _device_for(config: RunConfig) -> Hardware:
    """Return the device to plan for, with any number of GPUs."""
    if config.gpu == "cpu":
        device = detect_processor()
    else:
        device = hardware_named(config.gpu) if config.gpu is not None else detect_hardware()
    if config.gpu_memory is None:
        return device
    budget = parse_bytes(config.gpu_memory, "gpu_memory")
    if device.kind == "cpu" and config.gpu is None:
        note = "no GPU found: the plan is for a GPU with that memory; a run here uses the CPU (plan: --gpu cpu)"
        return replace(generic_gpu(budget), notes=(note,))
    return device.with_memory(min(device.memory_bytes, budget))


def hardware_here(config: RunConfig) -> Hardware:
    """Return the device of this machine, within `config.gpu_memory`.

    `hardware_for` differs when `config.gpu` names another GPU.
    """
    device = detect_hardware()
    if config.gpu_memory is None:
        return device
    return device.with_memory(min(device.memory_bytes, parse_bytes(config.gpu_memory, "gpu_memory")))


def detect_hardware() -> Hardware:
    """Return the first GPU in CUDA_VISIBLE_DEVICES with its free memory, else the CPU."""
    gpus = visible_gpus(_nvidia_smi(), os.environ.get("CUDA_VISIBLE_DEVICES"))
    if not gpus:
        return detect_processor()
    if _torch_version().endswith("+cpu"):
        note = f"{gpus[0].name} is present, but the installed torch is built without CUDA"
        return replace(detect_processor(), notes=(note,))
    are_idle = all(gpu.name == gpus[0].name and gpu.is_idle for gpu in gpus)
    return replace(_hardware(gpus[0]), count=len(gpus), idle_count=len(gpus) if are_idle else 1)


def visible_gpus(gpus: list[VisibleGpu], visible: str | None) -> list[VisibleGpu]:
    """Return the GPUs in `CUDA_VISIBLE_DEVICES`, in its order.

    It lists indices or UUIDs, and ends at the first unknown entry.
    """
    if visible is None:
        return gpus
    chosen: list[VisibleGpu] = []
    for token in (part.strip() for part in visible.split(",")):
        match = next((gpu for gpu in gpus if token and (token == gpu.index or gpu.uuid.startswith(token))), None)
        if match is None:
            break  # CUDA ignores everything from the first invalid entry on
        chosen.append(match)
    return chosen


def detect_processor() -> Hardware:
    """Return this machine's CPU, with the cores and memory that a run may use.

    Both respect the limits of a container.
    """
    cores = available_cores()
    flags = _cpu_field("flags") or ""
    gflops = CORE_PEAK_GFLOPS * (2 if "avx512f" in flags else 1)
    return Hardware(
        name=_cpu_field("model name") or platform.processor() or platform.machine(),
        kind="cpu",
        memory_bytes=available_bytes(),
        bf16="avx512_bf16" in flags or "amx_bf16" in flags,
        tflops_bf16=cores * gflops / 1000,
        usd_per_hour=(cores * CORE_USD_PER_HOUR[0], cores * CORE_USD_PER_HOUR[1]),
        cores=cores,
    )


def parse_nvidia_smi(text: str) -> list[VisibleGpu]:
    """Return the GPUs in the CSV that `nvidia-smi --query-gpu` prints for QUERY.

    Lines of another form are left out.
    """
    gpus = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) == len(QUERY.split(",")) and cells[0].isdigit():
            index, uuid, name, total, free, capability = cells
            major, _, minor = capability.partition(".")
            known = major.isdigit() and minor.isdigit()
            pair = (int(major), int(minor)) if known else None
            gpus.append(VisibleGpu(index, uuid, name, _mib(total), _mib(free), pair))
    return gpus


def _torch_version() -> str:
    """Return the installed torch's version from its metadata. Importing torch takes seconds."""
    try:
        return version("torch")
    except PackageNotFoundError:
        return ""


def _nvidia_smi() -> list[VisibleGpu]:
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    command = [program, f"--query-gpu={QUERY}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return parse_nvidia_smi(done.stdout) if done.returncode == 0 else []


def _hardware(gpu: VisibleGpu) -> Hardware:
    row = find_gpu(gpu.name)
    base = from_gpu(row) if row else generic_gpu((gpu.total_mib or 0) << 20, gpu.capability)
    capability = gpu.capability or base.capability
    assert capability is not None
    free = gpu.free_mib << 20 if gpu.free_mib is not None else base.memory_bytes
    notes = base.notes
    if gpu.free_mib is not None and gpu.total_mib and not gpu.is_idle:
        used = (gpu.total_mib - gpu.free_mib) / 1024
        notes += (f"{used:.1f} GiB of the GPU are taken by other programs or its driver",)
    return replace(
        base,
        name=gpu.name,
        memory_bytes=free,
        capability=capability,
        bf16=capability >= (8, 0),
        fp8=capability >= (8, 9),
        cores=available_cores(),
        host_bytes=round(available_bytes() * PINNED_SHARE),
        notes=notes,
    )


def _mib(text: str) -> int | None:
    return int(text) if text.isdigit() else None


def _cpu_field(key: str) -> str | None:
    for line in _lines("/proc/cpuinfo"):
        name, colon, value = line.partition(":")
        if colon and name.strip() == key:
            return value.strip()
    return None


def available_cores() -> int:
    """Return the cores that this process may use, from its affinity and its container's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, _, period = next(iter(_lines("/sys/fs/cgroup/cpu.max")), "").partition(" ")
    if quota.isdigit() and period.strip().isdigit():
        cores = min(cores, max(1, int(quota) // int(period)))
    return cores


def available_bytes() -> int:
    """Return the memory that this process can still use.

    It is the system's available memory, at most what its container's limit leaves.
    """
    info = _meminfo(_lines("/proc/meminfo"))
    available = info.get("MemAvailable") or int(psutil.virtual_memory().available)
    for limit, used, stat, key in CGROUP_MEMORY:
        limit_bytes, used_bytes = (_number(f"/sys/fs/cgroup/{name}") for name in (limit, used))
        if limit_bytes is not None:
            idle_bytes = dict(line.split()[:2] for line in _lines(f"/sys/fs/cgroup/{stat}")).get(key, "0")
            available = min(available, max(0, limit_bytes - max(0, (used_bytes or 0) - int(idle_bytes))))
    return available


def _meminfo(lines: list[str]) -> Mapping[str, int]:
    fields = (line.split() for line in lines)
    return {words[0].rstrip(":"): int(words[1]) << 10 for words in fields if len(words) == 3 and words[1].isdigit()}


def _number(path: str) -> int | None:
    text = next(iter(_lines(path)), "").strip()
    return int(text) if text.isdigit() else None


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
