"""Hardware: the GPU or CPU of a plan, and the catalogue of GPUs."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, replace
from typing import Any, Literal

from lorafit.config.foreign_text import size_in_words
from lorafit.errors import UsageError

PRICES_AS_OF = "2026-11"
ELECTRICITY = (0.02, 0.06)


@dataclass(frozen=True, slots=True)
class Gpu:
    """Hold one row of the catalogue.

    Attributes:
        name: Name of the GPU.
        memory_mib: Memory in MiB.
        capability: CUDA compute capability.
        tflops: Dense 16-bit matmul peak in TFLOP/s.
        bandwidth_gbs: Bandwidth of its own memory in GB/s.
        link_gbs: Bandwidth to the host in GB/s, each way.
        usd_per_hour: Price range (low, high), assumed.
        aliases: Other names.
    """

    name: str
    memory_mib: int
    capability: tuple[int, int]
    tflops: float
    bandwidth_gbs: float
    link_gbs: float
    usd_per_hour: tuple[float, float]
    aliases: tuple[str, ...] = ()


TURING, AMPERE, AMPERE_PRO, ADA, HOPPER, BLACKWELL, BLACKWELL_RTX = (
    (7, 5), (8, 6), (8, 0), (8, 9), (9, 0), (10, 0), (12, 0)
)  # fmt: skip
PCIE3, PCIE4_X8, PCIE4, PCIE5_X8, PCIE5 = 12.0, 12.0, 25.0, 25.0, 55.0  # 55: measured on an H200, both directions busy
NVLINK_GBS = {"H100": 450.0, "H200": 450.0, "B200": 900.0}
"""NVLink in GB/s, each way, from the data sheets of boards that have it in every server. V100 and A100 are sold with
and without it under one name, and bridges between two GPUs are optional: PCIe is assumed for them."""
HOME = (0.05, 0.20)

GPUS: tuple[Gpu, ...] = (
    # data centre
    Gpu("T4", 15360, TURING, 65, 320, PCIE3, (0.15, 0.60)),
    Gpu("V100 16GB", 16384, (7, 0), 125, 900, PCIE3, (0.15, 3.10), ("V100", "V100-SXM2-16GB", "V100-PCIE-16GB")),
    Gpu("V100 32GB", 32768, (7, 0), 125, 900, PCIE3, (0.25, 3.90), ("V100-SXM2-32GB", "V100-PCIE-32GB")),
    Gpu("A10", 23028, AMPERE, 125, 600, PCIE4, (0.40, 1.30)),
    Gpu("A10G", 23028, AMPERE, 70, 600, PCIE4, (0.50, 1.25)),
    Gpu("A16", 15356, AMPERE, 36, 200, PCIE4, (0.20, 0.60)),
    Gpu("A30", 24576, AMPERE_PRO, 165, 933, PCIE4, (0.30, 1.00)),
    Gpu("A40", 46068, AMPERE, 150, 696, PCIE4, (0.35, 1.30)),
    Gpu("L4", 23034, ADA, 121, 300, PCIE4_X8, (0.35, 0.90)),
    Gpu("L40", 46068, ADA, 181, 864, PCIE4, (0.60, 1.30)),
    Gpu("L40S", 46068, ADA, 362, 864, PCIE4, (0.70, 2.00)),
    # plain "A100" means the smaller one: a plan for 40 GB also runs on 80
    Gpu("A100 40GB", 40960, AMPERE_PRO, 312, 1555, PCIE4, (0.80, 3.70), ("A100", "A100-SXM4-40GB", "A100-PCIE-40GB")),
    Gpu("A100 80GB", 81920, AMPERE_PRO, 312, 2039, PCIE4, (1.10, 5.10), ("A100-SXM4-80GB", "A100 80GB PCIe")),
    Gpu("H100", 81559, HOPPER, 989, 3350, PCIE5, (1.90, 7.00), ("H100 80GB HBM3", "H100 SXM", "H100 80GB")),
    Gpu("H100 PCIe", 81559, HOPPER, 756, 2000, PCIE5, (1.80, 5.00), ("H100 80GB PCIe",)),
    Gpu("H100 NVL", 95830, HOPPER, 835, 3900, PCIE5, (1.90, 5.00)),
    Gpu("H200", 143771, HOPPER, 989, 4800, PCIE5, (2.30, 8.00), ("H200 SXM", "H200 141GB", "H200 141GB HBM3e")),
    Gpu("H200 NVL", 143771, HOPPER, 835, 4800, PCIE5, (2.20, 7.00)),
    Gpu("GH200", 97871, HOPPER, 989, 4000, 300.0, (1.50, 6.00), ("GH200 480GB", "GH200 96GB")),
    Gpu("B200", 183359, BLACKWELL, 2250, 8000, PCIE5, (2.90, 14.00), ("B200 180GB", "B200 192GB")),
    # workstation
    Gpu("RTX A2000 12GB", 12282, AMPERE, 32, 288, PCIE4, HOME, ("RTX A2000",)),
    Gpu("RTX A4000", 16376, AMPERE, 77, 448, PCIE4, (0.10, 0.60)),
    Gpu("RTX A4500", 20470, AMPERE, 95, 640, PCIE4, (0.15, 0.60)),
    Gpu("RTX A5000", 24564, AMPERE, 111, 768, PCIE4, (0.16, 0.80)),
    Gpu("RTX A6000", 49140, AMPERE, 155, 768, PCIE4, (0.33, 1.30), ("A6000",)),
    Gpu("RTX 4000 Ada", 20475, ADA, 107, 360, PCIE4, (0.20, 0.60)),
    Gpu("RTX 5000 Ada", 32760, ADA, 261, 576, PCIE4, (0.40, 0.90)),
    Gpu("RTX 6000 Ada", 49140, ADA, 364, 960, PCIE4, (0.50, 1.30), ("6000 Ada",)),
    Gpu(
        "RTX PRO 6000 Blackwell", 97887, BLACKWELL_RTX, 504, 1792, PCIE5, (0.90, 2.50),
        ("RTX PRO 6000", "RTX PRO 6000 Blackwell Server Edition", "RTX PRO 6000 Blackwell Workstation Edition"),
    ),
    # desktop
    Gpu("RTX 2060", 6144, TURING, 26, 336, PCIE3, HOME),
    Gpu("RTX 2060 12GB", 12288, TURING, 29, 336, PCIE3, HOME),
    Gpu("RTX 2060 Super", 8192, TURING, 29, 448, PCIE3, HOME),
    Gpu("RTX 2070", 8192, TURING, 30, 448, PCIE3, HOME),
    Gpu("RTX 2070 Super", 8192, TURING, 36, 448, PCIE3, HOME),
    Gpu("RTX 2080", 8192, TURING, 40, 448, PCIE3, HOME),
    Gpu("RTX 2080 Super", 8192, TURING, 45, 496, PCIE3, HOME),
    Gpu("RTX 2080 Ti", 11264, TURING, 54, 616, PCIE3, HOME),
    Gpu("TITAN RTX", 24576, TURING, 131, 672, PCIE3, (0.10, 0.30)),
    Gpu("RTX 3050", 8192, AMPERE, 18, 224, PCIE4_X8, HOME),
    Gpu("RTX 3060", 12288, AMPERE, 26, 360, PCIE4, HOME, ("RTX 3060 12GB",)),
    Gpu("RTX 3060 Ti", 8192, AMPERE, 32, 448, PCIE4, HOME),
    Gpu("RTX 3070", 8192, AMPERE, 41, 448, PCIE4, HOME),
    Gpu("RTX 3070 Ti", 8192, AMPERE, 43, 608, PCIE4, HOME),
    Gpu("RTX 3080", 10240, AMPERE, 60, 760, PCIE4, HOME, ("RTX 3080 10GB",)),
    Gpu("RTX 3080 12GB", 12288, AMPERE, 61, 912, PCIE4, HOME),
    Gpu("RTX 3080 Ti", 12288, AMPERE, 68, 912, PCIE4, HOME),
    Gpu("RTX 3090", 24576, AMPERE, 71, 936, PCIE4, (0.12, 0.45)),
    Gpu("RTX 3090 Ti", 24564, AMPERE, 80, 1008, PCIE4, (0.14, 0.50)),
    Gpu("RTX 4060", 8188, ADA, 30, 272, PCIE4_X8, HOME),
    Gpu("RTX 4060 Ti", 8188, ADA, 44, 288, PCIE4_X8, HOME, ("RTX 4060 Ti 8GB",)),
    Gpu("RTX 4060 Ti 16GB", 16380, ADA, 44, 288, PCIE4_X8, HOME),
    Gpu("RTX 4070", 12282, ADA, 58, 504, PCIE4, HOME),
    Gpu("RTX 4070 Super", 12282, ADA, 71, 504, PCIE4, HOME),
    Gpu("RTX 4070 Ti", 12282, ADA, 80, 504, PCIE4, HOME),
    Gpu("RTX 4070 Ti Super", 16376, ADA, 88, 672, PCIE4, HOME),
    Gpu("RTX 4080", 16376, ADA, 97, 717, PCIE4, (0.15, 0.40)),
    Gpu("RTX 4080 Super", 16376, ADA, 104, 736, PCIE4, (0.15, 0.40)),
    Gpu("RTX 4090", 24564, ADA, 165, 1008, PCIE4, (0.25, 0.75), ("RTX 4090 24GB",)),
    Gpu("RTX 5050", 8151, BLACKWELL_RTX, 26, 320, PCIE5_X8, HOME),
    Gpu("RTX 5060", 8151, BLACKWELL_RTX, 38, 448, PCIE5_X8, HOME),
    Gpu("RTX 5060 Ti", 8151, BLACKWELL_RTX, 47, 448, PCIE5_X8, HOME, ("RTX 5060 Ti 8GB",)),
    Gpu("RTX 5060 Ti 16GB", 16311, BLACKWELL_RTX, 47, 448, PCIE5_X8, HOME),
    Gpu("RTX 5070", 12227, BLACKWELL_RTX, 62, 672, PCIE5, HOME),
    Gpu("RTX 5070 Ti", 16303, BLACKWELL_RTX, 88, 896, PCIE5, (0.10, 0.30)),
    Gpu("RTX 5080", 16303, BLACKWELL_RTX, 113, 960, PCIE5, (0.15, 0.45)),
    Gpu("RTX 5090", 32607, BLACKWELL_RTX, 209, 1792, PCIE5, (0.35, 0.95)),
    # laptop
    Gpu("RTX 2060 Laptop", 6144, TURING, 18, 264, PCIE3, ELECTRICITY),
    Gpu("RTX 2070 Laptop", 8192, TURING, 24, 384, PCIE3, ELECTRICITY),
    Gpu("RTX 2080 Laptop", 8192, TURING, 31, 384, PCIE3, ELECTRICITY),
    Gpu("RTX 3050 Laptop", 4096, AMPERE, 11, 192, PCIE4_X8, ELECTRICITY),
    Gpu("RTX 3060 Laptop", 6144, AMPERE, 20, 336, PCIE4_X8, ELECTRICITY),
    Gpu("RTX 3070 Laptop", 8192, AMPERE, 30, 448, PCIE4_X8, ELECTRICITY),
    Gpu("RTX 3080 Laptop", 16384, AMPERE, 36, 448, PCIE4_X8, ELECTRICITY, ("RTX 3080 Laptop 16GB",)),
    Gpu("RTX 3080 Laptop 8GB", 8192, AMPERE, 36, 448, PCIE4_X8, ELECTRICITY),
    Gpu("RTX 4050 Laptop", 6141, ADA, 18, 192, PCIE4_X8, ELECTRICITY, ("RTX 4050",)),
    Gpu("RTX 4060 Laptop", 8188, ADA, 23, 256, PCIE4_X8, ELECTRICITY),
    Gpu("RTX 4070 Laptop", 8188, ADA, 31, 256, PCIE4_X8, ELECTRICITY),
    Gpu("RTX 4080 Laptop", 12282, ADA, 49, 432, PCIE4, ELECTRICITY),
    Gpu("RTX 4090 Laptop", 16376, ADA, 65, 576, PCIE4, ELECTRICITY),
    Gpu("RTX 5060 Laptop", 8151, BLACKWELL_RTX, 29, 384, PCIE5_X8, ELECTRICITY),
    Gpu("RTX 5070 Laptop", 8151, BLACKWELL_RTX, 36, 384, PCIE5_X8, ELECTRICITY),
    Gpu("RTX 5070 Ti Laptop", 12227, BLACKWELL_RTX, 47, 672, PCIE5_X8, ELECTRICITY),
    Gpu("RTX 5080 Laptop", 16303, BLACKWELL_RTX, 61, 896, PCIE5_X8, ELECTRICITY),
    Gpu("RTX 5090 Laptop", 24463, BLACKWELL_RTX, 83, 896, PCIE5_X8, ELECTRICITY),
)  # fmt: skip


GIB = 1 << 30
CORE_PEAK_GFLOPS = 100.0
"""ASSUMED fp32 peak of one core in GFLOP/s. It is AVX2 with two FMA units at 3 GHz, in place of a data sheet."""
CORE_GFLOPS_RANGE = (25.0, 60.0)
"""fp32 GFLOP/s of one core in training, for time ranges. The 3.5 M-parameter demo base ran 4–8 k tokens/s on two."""
CORE_GFLOPS = 40.0
"""One value within CORE_GFLOPS_RANGE, for comparing settings: ranges have no order."""
LEAST_HOST_BYTES = 8 * GIB
"""ASSUMED least memory that another machine can pin for activations. It can pin as much as its GPU has, or this."""
SEVERAL = re.compile(r"\s*(\d{1,4})\s*[x×*]\s*(\S.*)", re.IGNORECASE)
"""Several GPUs of one name, as `2 x RTX 4090`."""
DRIVER_SHARE = 0.02
"""Share of a GPU's memory that its driver keeps. It is nvidia-smi's figure less the memory that torch can allocate."""


@dataclass(frozen=True, slots=True)
class Hardware:
    """Hold one device.

    Attributes:
        name: Name of the device.
        kind: `cuda` or `cpu`.
        memory_bytes: Memory that a run may use.
        capability: CUDA compute capability.
        bf16: Whether it multiplies in bf16.
        fp8: Whether it multiplies in fp8.
        tflops_bf16: Dense 16-bit matmul peak in TFLOP/s.
        bandwidth_gbs: Bandwidth of its own memory in GB/s.
        link_gbs: Bandwidth to the host in GB/s, each way.
        usd_per_hour: Price range (low, high), assumed.
        cores: CPU cores that a run may use.
        count: Devices of this machine that are visible, or that its name counts.
        idle_count: Devices that a run may take unasked: all visible ones if they are alike and none is in use, else 1.
        host_bytes: Host memory that may be pinned for activations.
        notes: Assumptions and remarks for the user.
    """

    name: str
    kind: Literal["cuda", "cpu"]
    memory_bytes: int
    capability: tuple[int, int] | None = None
    bf16: bool = False
    fp8: bool = False
    tflops_bf16: float = 0.0
    bandwidth_gbs: float = 0.0
    link_gbs: float = 0.0
    usd_per_hour: tuple[float, float] = (0.0, 0.0)
    cores: int = 1
    count: int = 1
    idle_count: int = 1
    host_bytes: int = 0
    notes: tuple[str, ...] = ()

    def with_memory(self, memory_bytes: int) -> Hardware:
        """Return the same device with another memory budget, as `--gpu-memory` sets it."""
        return replace(self, memory_bytes=memory_bytes)

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready mapping."""
        return {
            "name": self.name,
            "kind": self.kind,
            "memory_bytes": self.memory_bytes,
            "capability": list(self.capability) if self.capability else None,
            "bf16": self.bf16,
            "fp8": self.fp8,
            "tflops_bf16": self.tflops_bf16,
            "bandwidth_gbs": self.bandwidth_gbs,
            "link_gbs": self.link_gbs,
            "usd_per_hour": list(self.usd_per_hour),
            "cores": self.cores,
            "count": self.count,
            "host_bytes": self.host_bytes,
            "notes": list(self.notes),
        }


def hardware_named(name: str) -> Hardware:
    """Return the GPU named `name`, such as `RTX 4090`, `h100` or `NVIDIA A100-SXM4-80GB`.

    `2 x RTX 4090` (or `2x4090`) is two of them. Raises UsageError for an unknown name.
    """
    several = SEVERAL.match(name)
    count, name = (int(several[1]), several[2]) if several else (1, name)
    gpu = find_gpu(name)
    if gpu is None:
        fix = f"did you mean '{_nearest(name)}'? For another GPU, pass --gpu-memory with its memory"
        raise UsageError(f"unknown GPU '{name:.60}'", where="gpu", fix=fix)
    if not count:
        raise UsageError("a plan needs one GPU or more", where="gpu", fix=f"write gpu: 2 x {gpu.name}")
    return replace(from_gpu(gpu), count=count)


def find_gpu(name: str) -> Gpu | None:
    """Return the catalogue's row for any spelling of a GPU's name, or None."""
    return _BY_KEY.get(_key(name))


def from_gpu(gpu: Gpu) -> Hardware:
    """Return the hardware that a row of the catalogue describes."""
    major, minor = gpu.capability
    memory = round((gpu.memory_mib << 20) * (1 - DRIVER_SHARE))
    return Hardware(
        name=gpu.name,
        kind="cuda",
        memory_bytes=memory,
        host_bytes=max(LEAST_HOST_BYTES, memory),
        capability=gpu.capability,
        bf16=major >= 8,
        fp8=(major, minor) >= (8, 9),
        tflops_bf16=gpu.tflops,
        bandwidth_gbs=gpu.bandwidth_gbs,
        link_gbs=gpu.link_gbs,
        usd_per_hour=gpu.usd_per_hour,
    )


def generic_gpu(memory_bytes: int, capability: tuple[int, int] | None = None) -> Hardware:
    """Return a GPU outside the catalogue, with this much memory.

    Its speed is assumed: that of a small GPU of 2020 or later.
    """
    capability = capability or (8, 6)
    return Hardware(
        name=f"GPU with {size_in_words(memory_bytes)}",
        kind="cuda",
        memory_bytes=memory_bytes,
        host_bytes=max(LEAST_HOST_BYTES, memory_bytes),
        capability=capability,
        bf16=capability >= (8, 0),
        fp8=capability >= (8, 9),
        tflops_bf16=30.0,
        bandwidth_gbs=300.0,
        link_gbs=12.0,
        usd_per_hour=(0.05, 0.50),
        notes=("lorafit has no data sheet of this GPU: its speed and price are assumed",),
    )


def _nearest(name: str) -> str:
    """Return the catalogue's name that is most similar to `name`, by key or by spelling."""
    names = {gpu.name.lower(): gpu.name for gpu in GPUS}
    near = difflib.get_close_matches(_key(name), _BY_KEY, n=1, cutoff=0.6)
    if near:
        return _BY_KEY[near[0]].name
    return names[(difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.0))[0]]


def _key(name: str) -> str:
    """Return the key of a GPU's name. `NVIDIA GeForce RTX 4090` and `rtx-4090` have the same key."""
    text = re.sub(r"[^a-z0-9]+", " ", name.lower())
    text = re.sub(r"\b(mobile|with max q design)\b", "laptop", text)
    text = re.sub(r"\b(nvidia|geforce|tesla|quadro|gpu|graphics|generation|gen)\b", " ", text)
    text = re.sub(r"\b(\d+)\s*(gib|gb|g)\b", r"\1gb", text)
    return re.sub(r"^rtx(?=\d{4}(?!ada))", "", text.replace(" ", ""))


_BY_KEY = {_key(name): gpu for gpu in reversed(GPUS) for name in (gpu.name, *gpu.aliases)}


def link_between(gpu: Hardware) -> tuple[str, float]:
    """Return the name of the link between GPUs of this kind, and its bandwidth in GB/s, each way.

    It is PCIe, at the rate to the host, where no NVLink is known.
    """
    if gpu.name in NVLINK_GBS:
        return "NVLink", NVLINK_GBS[gpu.name]
    return "PCIe", min(gpu.link_gbs, PCIE5)  # a GH200 reaches only its own host faster
