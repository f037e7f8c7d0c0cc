"""warm_compiler: what the compiler does once a process, done while the base is being loaded.

Imports, workers and hashes alone. No function is compiled here, though that would warm more: Dynamo puts random states
and the default dtype back as they were when it began, and AOTAutograd patches `nn.Module.__getattr__` while it traces,
whichever thread loads a model meanwhile.
"""

from __future__ import annotations

import threading
from contextlib import suppress
from importlib import import_module

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
