"""links: the bandwidth between the GPUs of one machine."""

from __future__ import annotations

from lorafit.hardware.device import PCIE5, Hardware

NVLINK_GBS = {"H100": 450.0, "H200": 450.0, "B200": 900.0}
"""NVLink in GB/s, each way, from the data sheets of boards that have it in every server. V100 and A100 are sold with
and without it under one name, and bridges between two cards are optional: PCIe is assumed for them."""


def link_between(gpu: Hardware) -> tuple[str, float]:
    """Return the name of the link between GPUs of this kind, and its bandwidth in GB/s, each way.

    It is PCIe, at the rate to the host, where no NVLink is known.
    """
    if gpu.name in NVLINK_GBS:
        return "NVLink", NVLINK_GBS[gpu.name]
    return "PCIe", min(gpu.link_gbs, PCIE5)  # a GH200 reaches only its own host faster
