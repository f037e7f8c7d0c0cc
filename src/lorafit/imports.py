"""imports: import large libraries without the garbage collector."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

LEAST_ADDRESS_SPACE = 1 << 30
"""Address space in which importing torch ends with an error of Python's at least. Below it the process aborts."""


@contextmanager
def importing_torch() -> Iterator[None]:
    """Import torch within the block. Raises MemoryError before it where `ulimit -v` leaves too little."""
    if sys.platform != "win32":
        import resource

        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        if limit != resource.RLIM_INFINITY and limit < LEAST_ADDRESS_SPACE:
            raise MemoryError
    with without_collector():
        yield


@contextmanager
def without_collector() -> Iterator[None]:
    """Keep the garbage collector off within the block, which imports torch or transformers.

    Modules live as long as the process. The collector would walk their million objects again and again and free none,
    which takes a fifth of the import's processor time. A program that turned it off itself finds it off afterwards.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if not gc.get_freeze_count():
            gc.freeze()  # the two calls move all objects to the oldest generation, unwalked
            gc.unfreeze()
        if was_on:
            gc.enable()
