"""The CUDA allocator: giving memory back, and how often it had to give back and ask again."""

from __future__ import annotations

import gc

import torch


def release_memory() -> None:
    """Give back what nobody refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def allocator_retries() -> int:
    """How often the allocator found no room, gave back what it kept and asked again, since the process began."""
    return int(torch.cuda.memory_stats().get("num_alloc_retries", 0))
