"""compute_dtype: the precision of the matmuls, from the settings and the device."""

from __future__ import annotations

import torch

from lorafit.backbone.kernels.nf4 import kernels_work
from lorafit.config import RunConfig
from lorafit.errors import BackboneError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp8": torch.bfloat16}
FP8_CAPABILITY = (8, 9)


def default_device() -> torch.device:
    """The current CUDA device, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def compute_dtype(config: RunConfig, device: str | torch.device | None = None) -> torch.dtype:
    """`config.compute` as a dtype; `auto` is bf16 where the card has it, else fp16, and fp32 on a CPU.

    With "fp8" only the frozen matmuls are in FP8, and all else in bf16.
    """
    if config.compute != "auto":
        return DTYPES[config.compute]
    place = default_device() if device is None else torch.device(device)
    if place.type != "cuda":
        return torch.float32
    # emulated bf16 is slower than fp16, so it does not count
    with torch.cuda.device(place):
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def computes_in_fp8(config: RunConfig, device: torch.device) -> bool:
    """Whether the frozen matmuls run in FP8. Raises BackboneError where the settings ask for it and it cannot be."""
    if config.compute != "fp8":
        return False
    if config.quantization == "none":
        raise BackboneError("compute=fp8 is for a base in 4 bits", fix="use quantization=nf4, or compute=bf16")
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    if capability < FP8_CAPABILITY:
        raise BackboneError(
            f"compute=fp8 needs an NVIDIA card of compute capability 8.9 or more, and this is {_in_words(device)}",
            fix="use compute=bf16",
        )
    if not kernels_work(device.index if device.index is not None else torch.cuda.current_device()):
        raise BackboneError("compute=fp8 needs Triton and a C compiler that it can use", fix="use compute=bf16")
    return True


def _in_words(device: torch.device) -> str:
    return f"an {torch.cuda.get_device_name(device)}" if device.type == "cuda" else "a CPU"
