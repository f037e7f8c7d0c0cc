"""SignalHandlers: what signals do within a `with` block, and what they did before once it ends. No torch."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Mapping
from types import FrameType, TracebackType
from typing import Any, Self

STOPPING = (signal.SIGINT, signal.SIGTERM)
Handler = Callable[[int, FrameType | None], None]


class SignalHandlers:
    """Within it each signal of `handlers` has its handler.

    Handlers can be set in the main thread alone: elsewhere this does nothing.
    """

    def __init__(self, handlers: Mapping[int, Handler]) -> None:
        self.handlers = handlers
        self.before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number, handler in self.handlers.items():
                self.before[number] = signal.signal(number, handler)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self.before.items():
            # None: it was set outside Python, and cannot be set back from here
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self.before.clear()
