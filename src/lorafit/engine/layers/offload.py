"""Offload: saved tensors wait in pinned host memory for their layer's backward.

Saved-tensor hooks around each layer pass every large tensor to a stream that copies it to the host while the next
layers run. In the backward a second stream copies a layer's tensors back while later layers are computed.
torchtune's `OffloadActivations` does the same; here a schedule computed from bytes says which tensors may be on the
GPU at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from threading import Thread
from typing import Any

import torch
from torch import Tensor

MIN_BYTES = 1 << 20
"""Size of the smallest offloaded tensor; copies of smaller ones would cost more launches than memory."""
CHUNK_BYTES = 1 << 30
"""Size of a chunk of pinned memory; torch rounds such requests up to powers of two."""
ALIGNMENT = 512


class PinnedArena:
    """Page-locked host memory, handed out from the start again at every micro-batch, in the same order."""

    def __init__(self) -> None:
        self.chunks: list[Tensor] = []
        self.chunk, self.used = 0, 0
        self.filled = 0  # chunks that the last micro-batch needed
        self.ahead: Thread | None = None

    def pin_ahead(self, size_bytes: int) -> None:
        """Pin the whole chunks that `size_bytes` holds, in the background.

        Page-locking a GiB takes a good part of a second, and the processor's other cores are idle during compilation.
        """
        missing = (size_bytes - self.reserved_bytes) // CHUNK_BYTES
        if missing > 0:
            self._wait()
            device = torch.cuda.current_device() if torch.cuda.is_available() else None
            self.ahead = Thread(target=self._pin, args=(missing, device), name="pin-ahead", daemon=True)
            self.ahead.start()

    def _pin(self, count: int, device: int | None) -> None:
        if device is not None:
            torch.cuda.set_device(device)  # the current device is set for each thread
        for _ in range(count):
            try:
                self.chunks.append(_pinned(CHUNK_BYTES))
            except RuntimeError:
                return  # no more can be locked; `take` tries again, and raises

    def _wait(self) -> None:
        if self.ahead is not None:
            self.ahead.join()
            self.ahead = None

    @property
    def reserved_bytes(self) -> int:
        """Return the bytes of page-locked host memory."""
        return sum(chunk.numel() for chunk in self.chunks)

    def restart(self) -> None:
        """Free all memory handed out so far, for the next micro-batch."""
        self.filled = self.chunk + (self.used > 0)
        self.chunk, self.used = 0, 0

    def trim(self) -> None:
        """Release the chunks that the last micro-batch before `restart` did not need."""
        self._wait()
        if len(self.chunks) > self.filled:
            del self.chunks[self.filled :]
            # older torch keeps them for the next request
            if torch.cuda.is_available() and hasattr(torch.accelerator, "empty_host_cache"):
                torch.accelerator.empty_host_cache()

    def take(self, like: Tensor) -> Tensor:
        """Return a flat pinned tensor of the size and dtype of `like`."""
        size = like.numel() * like.element_size()
        self._wait()
        while self.chunk < len(self.chunks) and self.used + size > self.chunks[self.chunk].numel():
            self.chunk, self.used = self.chunk + 1, 0
        if self.chunk == len(self.chunks):
            self.chunks.append(_pinned(max(CHUNK_BYTES, size)))
        piece = self.chunks[self.chunk][self.used : self.used + size]
        self.used += -(-size // ALIGNMENT) * ALIGNMENT
        return piece.view(like.dtype)


def _pinned(size_bytes: int) -> Tensor:
    return torch.empty(size_bytes, dtype=torch.uint8, pin_memory=torch.cuda.is_available())


@dataclass(eq=False, slots=True)
class OffloadedTensor:
    """Hold a saved tensor that was offloaded.

    Attributes:
        host: The copy on the host.
        shape: Shape of the tensor.
        stride: Its strides, as it lay in memory.
        source: The original on the GPU, until its copy has arrived.
        sent: Event after the copy to the host.
        back: The tensor on the GPU again.
        ready: Event after the copy back.
    """

    host: Tensor
    shape: torch.Size
    stride: tuple[int, ...]
    source: Tensor | None
    sent: Any = None
    back: Tensor | None = None
    ready: Any = None


class HostOffload:
    """Saved-tensor hooks that offload large saved tensors of some layers and bring them back in time.

    `schedule[i]` is the first layer whose tensors may be on the GPU while layer i is computed, in either pass
    (`memory.layer_costs.OffloadSchedule`); its last entry is for the loss. Without a schedule, two layers at a time.
    """

    def __init__(self) -> None:
        self.arena = PinnedArena()
        self.schedule: Sequence[int] = ()
        self.offloaded: dict[int, list[OffloadedTensor]] = {}
        self.released, self.prefetched, self.sent_bytes = 0, 0, 0
        cuda = torch.cuda.is_available()
        self.d2h_stream, self.h2d_stream = (torch.cuda.Stream() if cuda else None for _ in range(2))

    def begin(self) -> None:
        """Begin a new micro-batch, and drop the tensors of the last one."""
        self.offloaded, self.sent_bytes, self.released, self.prefetched = {}, 0, 0, 1 << 30
        self.arena.restart()
        if self.d2h_stream is not None and self.h2d_stream is not None:
            # the arena's first bytes are overwritten only after the last backward has read them
            self.d2h_stream.wait_stream(self.h2d_stream)

    @contextmanager
    def around(self, index: int, offloads: bool, keep: frozenset[int]) -> Iterator[None]:
        """Offload the saved tensors of layer `index` during its forward, except storages in `keep` (data pointers).

        The backward of a layer whose tensors stay starts the copies that earlier layers will need.
        """
        self._release(self._first(index))
        mine = self.offloaded.setdefault(index, []) if offloads else None

        def pack(tensor: Tensor) -> Tensor | OffloadedTensor:
            return self._send(mine, tensor) if mine is not None and _is_offloadable(tensor, keep) else tensor

        def unpack(saved: Tensor | OffloadedTensor) -> Tensor:
            self._prefetch(min(self._first(index), index))
            return _fetched(saved) if isinstance(saved, OffloadedTensor) else saved

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield

    def end_forward(self, layers: int) -> None:
        """End the forward, and free the memory that the schedule gives to the loss."""
        self._release(self._first(layers))

    def _first(self, index: int) -> int:
        return self.schedule[index] if index < len(self.schedule) else max(0, index - 1)

    def _release(self, first: int) -> None:
        """Drop the originals of layers before `first`, after waiting for their copies on the device."""
        for index in range(self.released, first):
            for offloaded in self.offloaded.get(index, ()):
                if offloaded.sent is not None:
                    torch.cuda.current_stream().wait_event(offloaded.sent)
                offloaded.source = None
        self.released = max(self.released, first)

    def _send(self, mine: list[OffloadedTensor], tensor: Tensor) -> OffloadedTensor:
        flat = tensor.detach().as_strided((tensor.numel(),), (1,))
        offloaded = OffloadedTensor(self.arena.take(tensor), tensor.shape, tensor.stride(), flat)
        if self.d2h_stream is None:
            offloaded.host.copy_(flat)
        else:
            self.d2h_stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.d2h_stream):
                offloaded.host.copy_(flat, non_blocking=True)
                offloaded.sent = self.d2h_stream.record_event()
        mine.append(offloaded)
        self.sent_bytes += flat.numel() * flat.element_size()
        return offloaded

    def _prefetch(self, first: int) -> None:
        """Start copying back the tensors of layers from `first` on, the last layer's first."""
        for index in sorted((index for index in self.offloaded if first <= index < self.prefetched), reverse=True):
            self._fetch(self.offloaded[index])
        self.prefetched = min(self.prefetched, first)

    def _fetch(self, layer: list[OffloadedTensor]) -> None:
        """Copy tensors back into memory of the computing stream, which also frees it.

        A tensor whose original is still on the GPU is used as it is.
        """
        for offloaded in layer:
            offloaded.back, offloaded.source = offloaded.source, None
        gone = [offloaded for offloaded in layer if offloaded.back is None]
        for offloaded in gone:
            offloaded.back = torch.empty_like(offloaded.host, device="cuda" if self.h2d_stream is not None else "cpu")
        if self.h2d_stream is None:
            for offloaded in gone:
                offloaded.back.copy_(offloaded.host)  # type: ignore[union-attr]
            return
        self.h2d_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.h2d_stream):
            for offloaded in gone:
                self.h2d_stream.wait_event(offloaded.sent)
                offloaded.back.copy_(offloaded.host, non_blocking=True)  # type: ignore[union-attr]
                offloaded.ready = self.h2d_stream.record_event()


def _fetched(saved: OffloadedTensor) -> Tensor:
    if saved.ready is not None:
        torch.cuda.current_stream().wait_event(saved.ready)
    assert saved.back is not None, "a saved tensor is read twice: retain_graph is not supported"
    tensor, saved.back = saved.back, None
    return tensor.as_strided(saved.shape, saved.stride)


def _is_offloadable(tensor: Tensor, keep: frozenset[int]) -> bool:
    large = tensor.numel() * tensor.element_size() >= MIN_BYTES
    return (
        large and tensor.is_floating_point() and tensor.untyped_storage().data_ptr() not in keep and _is_dense(tensor)
    )


def _is_dense(tensor: Tensor) -> bool:
    """Return True if the tensor's elements fill one contiguous range of memory, in any order."""
    wanted = 1
    for stride, size in sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape) if size > 1):
        if stride != wanted:
            return False
        wanted *= size
    return wanted == prod(tensor.shape)
