"""compute_dtype: the precision of the matmuls, from the settings and the device."""

from __future__ import annotations

import torch

from lorafit.config import RunConfig

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def default_device() -> torch.device:
    """The current CUDA device, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def compute_dtype(config: RunConfig, device: str | torch.device | None = None) -> torch.dtype:
    """`config.compute` as a dtype; `auto` is bf16 where the card has it, else fp16, and fp32 on a CPU."""
    if config.compute != "auto":
        return DTYPES[config.compute]
    place = default_device() if device is None else torch.device(device)
    if place.type != "cuda":
        return torch.float32
    # emulated bf16 is slower than fp16, so it does not count
    with torch.cuda.device(place):
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
