"""torch's allocators and its compiler, set up before a base is loaded."""

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

OPTION = "expandable_segments"
GROWING, FIXED = f"{OPTION}:True", f"{OPTION}:False"
VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
"""Where a user says how torch's allocator is to work; which of two torch prefers depends on its release."""

PAGE_BYTES = 20 << 20
"""What a block grows by. Torch holds against its limit what is asked for, and may then take up to a page more."""

PINNED = "pinned_"
"""Begins all settings of page-locked memory."""
MOST_THREADS = 8
PINNED_PAGES_STAY = (5, 12)
"""Linux: since this release a page that was locked stays its process's own when that forks. Before, what the process
then wrote could go to a new page, and the GPU read the old one; memory of CUDA's own is left out of forks."""

_set_here: list[str] = []
"""The settings that this module made last: not every torch has something that reads them back."""


def let_blocks_grow() -> None:
    """Have torch's blocks on the GPU grow from here on: where sizes vary, far less is lost between them.

    The variable that asks for this is read when CUDA starts, which importing bitsandbytes does; torch also takes it
    later, and blocks that are there already stay as they are. Whoever set it, to whichever value, is left alone.
    """
    said = _settings()
    if _spoken_for(OPTION, said) or "MallocAsync" in said or not torch.cuda.is_available() or not _known_to_work():
        return
    # a block that grows is refused by the driver, where it is, and not by the setting: better now than while loading
    with contextlib.suppress(AttributeError, RuntimeError, ValueError):
        try:
            _set(_with(said, GROWING))
            torch.empty(PAGE_BYTES, dtype=torch.uint8, device="cuda")
        except (RuntimeError, ValueError):
            _set(_with(said, FIXED))


def lock_pages_by_threads() -> None:
    """Have torch fault host memory in by several threads before CUDA locks it, from here on; to be called before
    `let_blocks_grow`.

    One call for a GiB faults its pages in one after another and keeps the process's other threads from mapping memory
    meanwhile, a compiler's among them: at 8 GiB the first step came after 16.3 s so, and by eight threads after 12.6
    (docs/performance.md). Whoever set anything about page-locked memory is left alone.
    """
    said = _settings()
    share = min(MOST_THREADS, available_cores() // 2)
    threads = 1 << max(0, share.bit_length() - 1)  # torch wants a power of two
    if threads == 1 or _spoken_for(PINNED, said) or "MallocAsync" in said or not torch.cuda.is_available():
        return
    if not _known_to_work() or _kernel() < PINNED_PAGES_STAY:
        return
    by_threads = f"{PINNED}use_cuda_host_register:True,{PINNED}num_register_threads:{threads}"
    with contextlib.suppress(AttributeError, RuntimeError, ValueError):  # a torch that has no such setting
        try:
            _set(_with(said, by_threads))
            torch.empty(PAGE_BYTES, dtype=torch.uint8, pin_memory=True)
        except (RuntimeError, ValueError):
            _set(_with(said, f"{PINNED}use_cuda_host_register:False"))


@contextlib.contextmanager
def fixed_blocks() -> Iterator[None]:
    """Within it new blocks do not grow, where `let_blocks_grow` had them grow.

    For pools of CUDA graphs: torch counts how often such a pool's blocks grew and how many pieces it gives back, and
    takes the pool for empty where the two agree. A pool of which something is still in use can be dropped under it,
    or the count fall below zero, which is an error.
    """
    said = _settings()
    if not _set_here or said != _set_here[-1] or not said.endswith(GROWING):
        yield
        return
    _set(said.removesuffix(GROWING) + FIXED)
    try:
        yield
    finally:
        _set(said)


def release_memory() -> None:
    """Give back what nobody refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def allocator_retries() -> int:
    """How often the allocator found no room, gave back what it kept and asked again, since the process began."""
    return int(torch.cuda.memory_stats().get("num_alloc_retries", 0))


def _spoken_for(option: str, said: str) -> bool:
    """Whether a user set anything that `option` begins, which the settings in force or a variable say."""
    return any(option in text for text in (said, *(os.environ.get(name, "") for name in VARIABLES)))


def _known_to_work() -> bool:
    """Elsewhere torch warns that it cannot; under WSL drivers fail, not always at once (pytorch/pytorch#192330)."""
    return sys.platform == "linux" and torch.version.hip is None and "microsoft" not in platform.release().lower()


def _kernel() -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"[0-9]+", platform.release())[:2])


def _settings() -> str:
    """The allocator's settings in force, as torch would be given them."""
    read = getattr(torch._C, "_accelerator_getAllocatorSettings", None)
    if read is not None:
        return str(read())
    asked = (os.environ[name] for name in VARIABLES if name in os.environ)
    return _set_here[-1] if _set_here else next(asked, "")


def _with(said: str, option: str) -> str:
    """`said` and `option`: torch takes settings as a whole, and what they leave out goes back to its default."""
    return ",".join(filter(None, (said.strip(" ,"), option)))


def _set(settings: str) -> None:
    newer = getattr(torch._C, "_accelerator_setAllocatorSettings", None)
    (newer or torch.cuda.memory._set_allocator_settings)(settings)
    _set_here[:] = [settings]


IMPORTS = ("torch.distributed.tensor.experimental", "sympy.physics.units")
"""The slow ones of what the first compile imports (torch 2.11 and 2.13); one that a release lacks is passed over."""


def warm_compiler() -> threading.Thread:
    """Do in the background what the first compile would have to; it waits less."""
    thread = threading.Thread(target=_warm, name="warm-compiler", daemon=True)
    thread.start()
    return thread


def _warm() -> None:
    import torch._inductor.compile_fx  # noqa: F401
    from torch._inductor.async_compile import AsyncCompile

    AsyncCompile.warm_pool()
    AsyncCompile.wakeup()  # else the workers start with the first kernel
    _hash_sources()
    for name in IMPORTS:
        with suppress(ImportError):
            import_module(name)


def _hash_sources() -> None:
    """Of torch (1.2 s) and of Triton (0.6 s), once a process: part of every cache key."""
    from torch._inductor.codecache import torch_key
    from torch.utils._triton import has_triton, triton_hash_with_backend

    torch_key()
    if has_triton():
        triton_hash_with_backend()
