"""Prefetched: an iterator that a background thread keeps ahead of, its tensors pinned for asynchronous copies."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import torch

AHEAD = 2  # items made before they are asked for


class Prefetched(Iterator[Any]):
    """The items of `source`, in its order, made by one thread. An error in the thread is raised where it was due.

    With `device` on CUDA every tensor of an item is copied into pinned memory, so that `.to(non_blocking=True)`
    returns before the copy is done. Close it when iteration ends early.
    """

    def __init__(self, source: Iterator[Any], device: torch.device) -> None:
        self.source, self.device = source, device
        self.made: queue.Queue[Any] = queue.Queue(AHEAD)
        self.closed = threading.Event()
        self.thread = threading.Thread(target=self._fill, name="lorafit-prefetch", daemon=True)
        self.thread.start()

    def __next__(self) -> Any:
        item = self.made.get()
        if isinstance(item, _Failure):
            self.made.put(item)  # asked again, it says so again
            raise item.error
        return item

    def close(self) -> None:
        """End the thread and wait for it."""
        self.closed.set()
        while self.thread.is_alive():
            try:
                self.made.get(timeout=0.01)
            except queue.Empty:
                continue

    def _fill(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        try:
            for item in self.source:
                if not self._put(pinned(item) if self.device.type == "cuda" else item):
                    return
        except BaseException as error:  # noqa: BLE001 (handed to the thread that asks)
            self._put(_Failure(error))
        else:
            self._put(_Failure(StopIteration()))

    def _put(self, item: Any) -> bool:
        while not self.closed.is_set():
            try:
                self.made.put(item, timeout=0.05)
            except queue.Full:
                continue
            return True
        return False


class _Failure:
    def __init__(self, error: BaseException) -> None:
        self.error = error


def pinned(value: Any) -> Any:
    """`value` with every tensor in it (through dataclasses, lists and tuples) in pinned memory."""
    if isinstance(value, torch.Tensor):
        return value.pin_memory()
    if isinstance(value, list | tuple):
        return type(value)(pinned(part) for part in value)
    if is_dataclass(value) and not isinstance(value, type):
        return type(value)(**{field.name: pinned(getattr(value, field.name)) for field in fields(value)})
    return value
