"""Runtime: torch's allocators and compiler, configured before a base is loaded."""

from __future__ import annotations

import contextlib
import gc
import os
import platform
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from importlib import import_module

import torch

from lorafit.hardware.detect import available_cores

GROWTH = "expandable_segments"
GROWING, FIXED = f"{GROWTH}:True", f"{GROWTH}:False"
VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
"""Environment variables for the user's allocator settings.

torch's release decides which of the two has precedence.
"""

PAGE_BYTES = 20 << 20
"""Bytes by which a block grows.

Torch checks the requested bytes against its limit, and may then take up to a page more.
"""

PINNED = "pinned_"
"""Prefix of all settings of page-locked memory."""
MAX_THREADS = 8
PINNED_SAFE_KERNEL = (5, 12)
"""First Linux release in which a page-locked page stays with its process after a fork.

Before, the process's next write could go to a new page while the GPU read the old one. Memory that CUDA itself
page-locks is left out of forks.
"""

_set_here: list[str] = []
"""The last settings that this module made; not every torch can read them back."""
SLOW_IMPORTS = ("torch.distributed.tensor.experimental", "sympy.physics.units")
"""Slow imports of the first compile (torch 2.11 and 2.13).

A module that a release lacks is skipped.
"""


def let_blocks_grow() -> None:
    """Let torch's new blocks on the GPU grow.

    With varying sizes, far less memory is lost between growing blocks. The variable for this setting is read when CUDA
    starts, which importing bitsandbytes causes. torch also accepts the setting later, and existing blocks stay as they
    are. A value that the user set is kept.
    """
    current = _settings()
    if _set_by_user(GROWTH, current) or "MallocAsync" in current:
        return
    if not torch.cuda.is_available() or not _is_supported():
        return
    # a driver without growing blocks refuses the first block, not the setting: find out now, not while loading
    with contextlib.suppress(AttributeError, RuntimeError, ValueError):
        try:
            _set(_with(current, GROWING))
            torch.empty(PAGE_BYTES, dtype=torch.uint8, device="cuda")
        except (RuntimeError, ValueError):
            _set(_with(current, FIXED))


def lock_pages_by_threads() -> None:
    """Let torch fault in pinned host memory by several threads before CUDA locks it.

    Call it before `let_blocks_grow`. A single call for a GiB faults its pages in one after another and keeps the
    process's other threads, such as the compiler's, from mapping memory meanwhile: at 8 GiB the first step came after
    16.3 s, and with eight threads after 12.6 (docs/performance.md). A value that the user set is kept.
    """
    current = _settings()
    wanted = min(MAX_THREADS, available_cores() // 2)
    threads = 1 << max(0, wanted.bit_length() - 1)  # torch requires a power of two
    if threads == 1 or _set_by_user(PINNED, current) or "MallocAsync" in current or not torch.cuda.is_available():
        return
    if not _is_supported() or _kernel_release() < PINNED_SAFE_KERNEL:
        return
    by_threads = f"{PINNED}use_cuda_host_register:True,{PINNED}num_register_threads:{threads}"
    with contextlib.suppress(AttributeError, RuntimeError, ValueError):  # raised by a torch without this setting
        try:
            _set(_with(current, by_threads))
            torch.empty(PAGE_BYTES, dtype=torch.uint8, pin_memory=True)
        except (RuntimeError, ValueError):
            _set(_with(current, f"{PINNED}use_cuda_host_register:False"))


@contextlib.contextmanager
def fixed_blocks() -> Iterator[None]:
    """Create blocks that do not grow, inside the block of code.

    It undoes `let_blocks_grow` for pools of CUDA graphs. torch counts how often such a pool's blocks grew and how many
    pieces it gives back, and takes the pool for empty if the two are equal. A pool in use can then be dropped, or the
    count fall below zero, which is an error.
    """
    current = _settings()
    if not _set_here or current != _set_here[-1] or not current.endswith(GROWING):
        yield
        return
    _set(current.removesuffix(GROWING) + FIXED)
    try:
        yield
    finally:
        _set(current)


def release_memory() -> None:
    """Release memory that nothing refers to."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def allocator_retries() -> int:
    """Return the number of times since the start that the allocator ran out, released its cache and retried."""
    return int(torch.cuda.memory_stats().get("num_alloc_retries", 0))


def _set_by_user(option: str, current: str) -> bool:
    """Return True if the current settings or an environment variable mention `option`."""
    return any(option in text for text in (current, *(os.environ.get(name, "") for name in VARIABLES)))


def _is_supported() -> bool:
    """Return True if growing blocks work on this system.

    On other systems torch warns that they do not. Under WSL drivers fail, not always at once (pytorch/pytorch#192330).
    """
    return sys.platform == "linux" and torch.version.hip is None and "microsoft" not in platform.release().lower()


def _kernel_release() -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"[0-9]+", platform.release())[:2])


def _settings() -> str:
    """Return the allocator's current settings, in torch's own format."""
    read = getattr(torch._C, "_accelerator_getAllocatorSettings", None)
    if read is not None:
        return str(read())
    asked = (os.environ[name] for name in VARIABLES if name in os.environ)
    return _set_here[-1] if _set_here else next(asked, "")


def _with(current: str, option: str) -> str:
    """Return `current` with `option` added.

    torch takes settings as a whole, and resets every setting that is left out to its default.
    """
    return ",".join(filter(None, (current.strip(" ,"), option)))


def _set(settings: str) -> None:
    newer = getattr(torch._C, "_accelerator_setAllocatorSettings", None)
    (newer or torch.cuda.memory._set_allocator_settings)(settings)
    _set_here[:] = [settings]


def warm_compiler() -> threading.Thread:
    """Prepare the first compile in a background thread, and return the thread."""
    thread = threading.Thread(target=_warm, name="warm-compiler", daemon=True)
    thread.start()
    return thread


def _warm() -> None:
    import torch._inductor.compile_fx  # noqa: F401
    from torch._inductor.async_compile import AsyncCompile

    AsyncCompile.warm_pool()
    AsyncCompile.wakeup()  # starts the workers now, not with the first kernel
    _hash_sources()
    for name in SLOW_IMPORTS:
        with suppress(ImportError):
            import_module(name)


def _hash_sources() -> None:
    """Hash the sources of torch (1.2 s) and of Triton (0.6 s), once a process.

    The hashes are part of every cache key.
    """
    from torch._inductor.codecache import torch_key
    from torch.utils._triton import has_triton, triton_hash_with_backend

    torch_key()
    if has_triton():
        triton_hash_with_backend()
