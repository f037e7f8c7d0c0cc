"""Graphs: micro-batches that would wait for the processor run as CUDA graphs, recorded once and started in one call.

Starting a layer's kernels takes the processor some 3 ms, forward and backward, however few the tokens: longer than
the kernels themselves for small steps and small models. A graph fixes shapes, so micro-batches are filled up to a
bucket's size (`buckets.py`), from the first one on: whether one is replayed or not changes no bit.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lorafit.config.dial import Dial
from lorafit.engine.allocator import fixed_blocks, release_memory
from lorafit.engine.batch import MicroBatch
from lorafit.engine.buckets import Bucket
from lorafit.engine.layers import DecoderLayers

MOST = 32
"""Buckets that are kept. A graph takes some 3 MB of the card for 16 layers (H200), unseen by torch's allocator."""

ROOM = 1.1
"""The pool's first block against what one micro-batch takes: what is lost between blocks that come and go."""

Pass = Callable[[MicroBatch, Tensor | float], Tensor]
"""Forward and backward of a micro-batch on the card, and its loss (), detached, times the share given."""


def recordable(layers: DecoderLayers) -> bool:
    """Whether micro-batches of such layers can be recorded: compiled, in bf16, and without capped scores, for other
    kernels than flash attention's are started by the lengths of rows."""
    capped = getattr(layers.core.config.get_text_config(), "attn_logit_softcapping", None)
    return bool(layers.compiled and layers.core.dtype is torch.bfloat16 and not capped)


class Graphs:
    """Runs micro-batches of at most `layers.dial.graphs` tokens as CUDA graphs, others as they are.

    A bucket's first micro-batch runs as it is, its second is recorded. All graphs share one pool of memory, since no
    two run at once, and add to gradients that stay where they are. The pool begins with one block of `arena_bytes`:
    the blocks of such a pool neither grow (`fixed_blocks`) nor go, so that each new size would take more. What
    graphs refer to is watched: when `layers` are turned, or adapters move, they are made anew. Where recording fails,
    training goes on without, still filled up, so that a run that goes on and can record has the same bits; `tell` is
    told why. Memory that runs out while recording is the caller's to make room for, like any other.
    """

    def __init__(
        self, layers: DecoderLayers, longest: int, trained: Sequence[nn.Parameter], *, arena_bytes: int = 0
    ) -> None:
        self.layers, self.longest, self.trained = layers, longest, list(trained)
        self.device, self.arena_bytes = self.trained[0].device, arena_bytes
        self.tell: Callable[[str], object] = layers.note
        self.failed = False
        self.replays = 0
        self._frames: OrderedDict[Bucket, _Frame] = OrderedDict()
        self._gradients: list[Tensor] = []
        self._arena: torch.cuda.CUDAGraph | None = None
        self._of: tuple[Dial, int, list[int]] | None = None
        self._pool: Any = None

    @property
    def records(self) -> bool:
        """Whether micro-batches that are small enough are filled up and recorded."""
        dial = self.layers.dial
        return dial.graphs > 0 and dial.takes_graphs and recordable(self.layers)

    @property
    def gradient_bytes(self) -> int:
        """What the gradients take that graphs add to."""
        return sum(gradient.nbytes for gradient in self._gradients)

    def run(self, batch: MicroBatch, share: float, work: Pass) -> Tensor:
        """`work(batch, share)`; its gradients are added to the trained weights' `grad`. Raises OutOfMemoryError."""
        if not self.records:
            self.forget()
            return work(batch.to(self.device, non_blocking=True), share)
        now = self.layers.dial, self.layers.turned, [weight.data_ptr() for weight in self.trained]
        if now != self._of:
            self.forget()
            self._of = now
        self._own_gradients()
        if batch.tokens > self.layers.dial.graphs:
            return work(batch.to(self.device, non_blocking=True), share)
        frame = self._frame(Bucket.of(batch, self.layers.dial.graphs, self.longest))
        frame.take(batch, share)
        if frame.seen and frame.graph is None and not self.failed:
            self._record(frame, work)
        frame.seen = True
        if frame.graph is None:  # not yet, or never: it runs filled up all the same
            return frame.through(work)
        frame.graph.replay()
        self.replays += 1
        return frame.loss.clone()

    def forget(self) -> None:
        """Let go of all graphs and of their memory."""
        self._gradients = []
        if self._frames:
            self._finish()
            self._frames.clear()
            self._arena = None
            self._pool = None  # a pool that nothing uses any more cannot be used again while a block of it is alive
            release_memory()

    def give_back(self) -> bool:
        """Let go of all graphs for something that is short of memory; they are recorded again when they come up.
        False where there was none."""
        held = any(frame.graph is not None for frame in self._frames.values())
        self.forget()
        return held

    def _frame(self, bucket: Bucket) -> _Frame:
        if bucket not in self._frames:
            self._frames[bucket] = _Frame(bucket, self.device)
        self._frames.move_to_end(bucket)
        if len(self._frames) > MOST:
            self._finish()
            self._frames.popitem(last=False)
        return self._frames[bucket]

    def _finish(self) -> None:
        """Wait for what was replayed: no graph may go while it runs."""
        if any(frame.graph for frame in self._frames.values()):
            torch.cuda.synchronize(self.device)

    def _own_gradients(self) -> None:
        """Have every trained weight's gradient be the tensor that graphs add to, with what it holds already."""
        if not self._gradients:
            self._gradients = [torch.zeros_like(weight) for weight in self.trained]
        fresh = []
        for weight, own in zip(self.trained, self._gradients, strict=True):
            if weight.grad is own:
                continue
            if weight.grad is None:
                fresh.append(own)
            else:
                own.copy_(weight.grad)
            weight.grad = own
        if fresh:
            torch._foreach_zero_(fresh)

    def _record(self, frame: _Frame, work: Pass) -> None:
        """Record `frame`; where that fails, nothing will be from then on. Raises torch.OutOfMemoryError."""
        reason = ""
        try:
            with fixed_blocks(), _mended_if_broken(self.device, lambda: self._pool):
                if self._pool is None:
                    self._pool = torch.cuda.graph_pool_handle()
                if self._arena is None and self.arena_bytes:
                    self._arena, _ = self._recorded(self._take_arena)
                frame.graph, frame.loss = self._recorded(partial(frame.through, work))
        except torch.OutOfMemoryError:
            self.forget()
            raise
        except RuntimeError as error:
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
        if reason:  # outside of the handler, whose error holds on to what was recorded so far
            self.failed = True
            self.forget()
            self.tell(f"micro-batches cannot be recorded as CUDA graphs ({reason}); they run without")

    def _recorded(self, work: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """A graph of `work`, and what that returned."""
        graph = torch.cuda.CUDAGraph()
        # other threads page-lock memory and copy meanwhile, which is none of the graph's business
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            out = work()
        return graph, out

    def _take_arena(self) -> Tensor:
        block = torch.empty(round(self.arena_bytes * ROOM), dtype=torch.uint8, device=self.device)
        return block[:1].zero_().clone()


@contextlib.contextmanager
def _mended_if_broken(device: torch.device, pool: Callable[[], Any]) -> Iterator[None]:
    """When a recording within breaks, put right what torch leaves as it is (`CUDAGraph::capture_end` says so itself):
    random numbers and memory that go on counting as part of it, and the stream. What the broken recording had taken
    stays taken until the process ends, in torch up to 2.13 at least (pytorch/pytorch#190348)."""
    if device.type != "cuda":
        yield
        return
    generator, stream = torch.cuda.default_generators[device.index or 0], torch.cuda.current_stream(device)
    before = generator.clone_state()
    try:
        yield
    except RuntimeError:
        torch.cuda.set_stream(stream)
        generator.graphsafe_set_state(before)
        with contextlib.suppress(RuntimeError):  # it had ended after all
            torch._C._cuda_endAllocateToPool(device.index or 0, pool())
        raise


class _Frame:
    """One bucket: where its micro-batches are put, and their graph once there is one."""

    def __init__(self, bucket: Bucket, device: torch.device) -> None:
        self.bucket = bucket
        self.filled = torch.zeros(bucket.size, dtype=torch.int64, device=device)
        self.share = torch.zeros((), device=device)
        self.seen = False
        self.graph: torch.cuda.CUDAGraph | None = None
        self.loss = self.share

    def take(self, batch: MicroBatch, share: float) -> None:
        """Put `batch` and `share` where the graph finds them, without waiting for the card."""
        filled = self.bucket.filled(batch.to("cpu"))
        self.filled.copy_(filled.pin_memory() if self.filled.is_cuda else filled, non_blocking=True)
        self.share.fill_(share)

    def through(self, work: Pass) -> Tensor:
        """`work` of what lies there."""
        return work(self.bucket.batch_of(self.filled), self.share)
