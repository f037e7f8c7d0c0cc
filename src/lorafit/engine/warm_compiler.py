"""warm_compiler: the compiler's imports and its worker processes, made ready while the base is being loaded."""

from __future__ import annotations

import threading


def warm_compiler() -> threading.Thread:
    """Start importing torch's compiler and starting its workers, in the background; the first compile waits less."""
    thread = threading.Thread(target=_warm, name="warm-compiler", daemon=True)
    thread.start()
    return thread


def _warm() -> None:
    import torch._inductor.compile_fx  # noqa: F401
    from torch._inductor.async_compile import AsyncCompile
    from torch._inductor.codecache import torch_key

    AsyncCompile.warm_pool()
    AsyncCompile.wakeup()  # else the workers start with the first kernel
    torch_key()  # a hash of torch's own source, part of every cache key: 1.2 s, once a process
