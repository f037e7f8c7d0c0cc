"""moments_ahead: 8-bit moments in host memory, copied to the GPU and back while it computes."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorafit.methods.full.optimizer import BLOCK, CHUNK, MOMENTS, place_of

BUFFERS = 3
"""Buffers on the GPU: the moments of one chunk are updated, those of the last go back, those of the next arrive."""


@dataclass(frozen=True, eq=False)
class _Chunk:
    """Name the moments of one chunk of a weight.

    Attributes:
        state: the weight's moments, on the host.
        part: the chunk's place among the weight's values.
        count: the weight's number of values.
    """

    state: Mapping[str, Any]
    part: slice
    count: int

    def is_same(self, other: _Chunk) -> bool:
        return self.state is other.state and self.part == other.part

    def on_host(self) -> dict[str, Tensor]:
        """Return the chunk's moments and scales, as views."""
        held = {name: self.state[name].view(-1) for name in MOMENTS}
        return {name: value[place_of(value, self.part, self.count)] for name, value in held.items()}


@dataclass(eq=False)
class _Buffer:
    """Hold the moments of one chunk on the GPU.

    Attributes:
        tensors: moments and scales of a whole chunk.
        holds: the chunk whose moments were copied here last.
        arrived: event after the copy to the GPU; None on a CPU.
        left: event after the copy to the host; None on a CPU, and before the first.
    """

    tensors: dict[str, Tensor]
    holds: _Chunk | None = None
    arrived: Any = None
    left: Any = None

    @classmethod
    def on(cls, device: torch.device) -> _Buffer:
        sizes = {"state": (CHUNK, torch.uint8), "absmax": (CHUNK // BLOCK, torch.float32)}
        kinds = {name: sizes[name.rstrip("12")] for name in MOMENTS}
        return cls({name: torch.empty(size, dtype=dtype, device=device) for name, (size, dtype) in kinds.items()})


class MomentsAhead:
    """Copy the moments of each chunk to the GPU before its update, and back after it, in streams of their own.

    The chunks of a step are expected in the order of the longest step so far. Where another one comes, its moments are
    copied then, and no further ones ahead in that step.
    """

    def __init__(self, device: torch.device) -> None:
        self._to_gpu, self._to_host = (_stream(device) for _ in range(2))
        self._free = deque(_Buffer.on(device) for _ in range(BUFFERS))
        self._ahead: deque[_Buffer] = deque()
        self._updated: _Buffer | None = None
        self._order: list[_Chunk] = []
        self._seen: list[_Chunk] = []
        self._next = 0

    def begin(self) -> None:
        """Begin a step: its first moments come to the GPU."""
        self._forget_ahead()
        if len(self._seen) >= len(self._order):
            self._order = self._seen
        self._seen, self._next = [], 0
        if self._to_gpu is not None:
            self._to_gpu.wait_stream(self._to_host)  # what the last step wrote
        self._fetch_ahead()

    def take(self, state: Mapping[str, Any], part: slice, count: int) -> dict[str, Any]:
        """Return `state` with the moments of the chunk `part` of a weight of `count` values, on the GPU."""
        chunk = _Chunk(state, part, count)
        self._seen.append(chunk)
        if not self._ahead or self._ahead[0].holds is None or not self._ahead[0].holds.is_same(chunk):
            self._forget_ahead()
            self._next = len(self._order)
            self._fetch(chunk)
        self._updated = buffer = self._ahead.popleft()
        if buffer.arrived is not None:
            torch.cuda.current_stream().wait_event(buffer.arrived)
        sizes = {name: value.numel() for name, value in chunk.on_host().items()}
        return {**state, **{name: buffer.tensors[name][:size] for name, size in sizes.items()}}

    def put_back(self) -> None:
        """Copy the moments that `take` returned last to the host, and fetch others into their buffer."""
        buffer, self._updated = self._updated, None
        assert buffer is not None and buffer.holds is not None, "nothing was taken"
        with _in_stream(self._to_host) as done:
            for name, held in buffer.holds.on_host().items():
                held.copy_(buffer.tensors[name][: held.numel()], non_blocking=True)
        buffer.left = done[0]
        self._free.append(buffer)
        self._fetch_ahead()

    def _fetch_ahead(self) -> None:
        while self._free and self._next < len(self._order):
            self._fetch(self._order[self._next])
            self._next += 1

    def _fetch(self, chunk: _Chunk) -> None:
        """Start to copy the moments of `chunk` to a free buffer, once the buffer's last ones have left."""
        buffer = self._free.popleft()
        with _in_stream(self._to_gpu, buffer.left) as done:
            for name, held in chunk.on_host().items():
                buffer.tensors[name][: held.numel()].copy_(held, non_blocking=True)
        buffer.holds, buffer.arrived = chunk, done[0]
        self._ahead.append(buffer)

    def _forget_ahead(self) -> None:
        self._free.extend(self._ahead)
        self._ahead.clear()


def _stream(device: torch.device) -> Any:
    return torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]


@contextmanager
def _in_stream(stream: Any, after: Any = None) -> Iterator[list[Any]]:
    """Run the block in `stream`, after an event or all work so far; then the list's one item is its own event."""
    done: list[Any] = [None]
    if stream is None:
        yield done
        return
    if after is None:
        stream.wait_stream(torch.cuda.current_stream())
    else:
        stream.wait_event(after)
    with torch.cuda.stream(stream):
        yield done
        done[0] = stream.record_event()
