"""bitsandbytes import: bitsandbytes, imported once, without its warnings and without torch's compiler.

On some CPUs bitsandbytes warns while it is imported. It also wraps four functions in torch.compile, which imports the
compiler; a process that calls none of them starts in two thirds of the time without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial, wraps
from typing import Any

import torch

from lorafit.backbone.library_logging import redirect_library_logs


@contextmanager
def compiling_when_called() -> Iterator[None]:
    """Let functions that are decorated with torch.compile within the block be compiled at their first call."""
    at_once = torch.compile

    def when_called(function: Callable[..., Any] | None = None, **options: Any) -> Callable[..., Any]:
        if function is None:
            return partial(when_called, **options)
        compiled = cache(lambda: at_once(function, **options))

        @wraps(function)
        def call(*given: Any, **named: Any) -> Any:
            return compiled()(*given, **named)

        return call

    torch.compile = when_called  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = at_once


with redirect_library_logs(), compiling_when_called():
    import bitsandbytes
    from bitsandbytes.functional import QuantState
    from bitsandbytes.nn import Linear4bit, Params4bit

__all__ = ["Linear4bit", "Params4bit", "QuantState", "bitsandbytes", "compiling_when_called"]
