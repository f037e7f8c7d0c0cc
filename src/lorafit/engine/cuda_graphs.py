"""CUDA graphs: micro-batches that would wait for the processor are recorded once and replayed."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lorafit.config.memory_policy import MemoryPolicy
from lorafit.engine.attention.packed import ROUND_WIDTH
from lorafit.engine.layers.decoder import DecoderLayers
from lorafit.engine.loss.vocabulary import IGNORED
from lorafit.engine.packing import MicroBatch, Segments, layout_on, on_host, require_plain
from lorafit.engine.runtime import fixed_blocks, release_memory

SIZES = 16
"""Sizes up to the largest, equally far apart: steps of a like number of examples differ by a share of that."""
LEAST_STEP, LEAST_ROWS = 64, 8
BLOCK = 128
"""The longest row is rounded up to a multiple of this, the rows of a block of attention."""


@dataclass(frozen=True, slots=True)
class Bucket:
    """Sizes of a filled micro-batch: its tokens, its rows, the most tokens of a row, and its supervised tokens;
    `even`: all rows are that long."""

    tokens: int
    rows: int
    longest: int
    supervised: int
    even: bool

    @classmethod
    def of(cls, batch: MicroBatch, most: int, longest: int) -> Bucket:
        """The one that `batch` goes into, where none has more than `most` tokens, and no row more than `longest`.

        Rows of one round length, which fixed-length data has, make a bucket of their own: cuDNN takes them.
        """
        require_plain(batch, "a CUDA graph")
        step = _rounded(-(-most // SIZES), LEAST_STEP)
        rows, width, *others = on_host(batch.segments.layout).tolist()
        if not others and rows * width == batch.tokens and width % ROUND_WIDTH == 0:
            return cls(batch.tokens, rows, width, _supervised(batch, batch.tokens, step), even=True)
        tokens = _rounded(batch.tokens, step)
        # one row more for the filler, which is less than a step
        filled = max(LEAST_ROWS, 1 << batch.segments.cu_seqlens.shape[0].bit_length())
        most_of_row = _rounded(max(longest, step), BLOCK)
        return cls(tokens, filled, most_of_row, _supervised(batch, tokens, step), even=False)

    @property
    def size(self) -> int:
        """Numbers in a filled micro-batch."""
        return 2 * self.tokens + 2 * self.supervised + self.rows + 1

    def filled(self, batch: MicroBatch) -> torch.Tensor:
        """`batch`, on the CPU, filled up with a row of unsupervised tokens and with empty rows: `size` numbers.

        Filler attends to itself alone and has no loss, so that it adds zeros to the adapters' gradients.
        """
        extra, spare = self.tokens - batch.tokens, self.supervised - batch.supervised
        cu_seqlens = batch.segments.cu_seqlens.numpy()
        parts = (
            _with(batch.ids[0].numpy(), np.zeros(extra, np.int64)),
            _with(batch.positions[0].numpy(), np.arange(extra)),
            # from the end, where the filler is: a token with many gradients to add up takes its time
            _with(batch.predictors.numpy(), np.arange(self.tokens - spare, self.tokens)),
            _with(batch.targets.numpy(), np.full(spare, IGNORED)),
            _with(cu_seqlens, np.full(self.rows + 1 - len(cu_seqlens), self.tokens)),
        )
        return torch.from_numpy(np.concatenate(parts))

    def batch_of(self, filled: torch.Tensor) -> MicroBatch:
        """The micro-batch in `filled` (size,) int64, on its device; its tensors are views, but for the cu_seqlens."""
        sizes = [self.tokens, self.tokens, self.supervised, self.supervised, self.rows + 1]
        ids, positions, predictors, targets, cu_seqlens = filled.split(sizes)
        # two tensors: one handed over twice would have compiled layers made anew
        gather, scatter = (torch.arange(self.tokens, device=filled.device) for _ in range(2))
        # a second, empty group says that the rows' lengths are known to `cu_seqlens` alone
        layout = torch.tensor([self.rows, self.longest, *([] if self.even else [0, 0])])
        segments = Segments(cu_seqlens.to(torch.int32), gather, scatter, layout_on(filled.device, layout))
        return MicroBatch(ids[None], positions[None], predictors, targets, segments)


def _supervised(batch: MicroBatch, tokens: int, step: int) -> int:
    """In steps twice as large: each size is a graph, and the head's share of the work is small."""
    return min(_rounded(max(batch.supervised, 1), 2 * step), tokens)


def _rounded(size: int, step: int) -> int:
    """The next multiple of `step`."""
    return -(-size // step) * step


def _with(values: NDArray[np.integer], more: NDArray[np.integer]) -> NDArray[np.int64]:
    return np.concatenate([values, more]).astype(np.int64)


MOST = 32
"""Buckets that are kept. A graph takes some 3 MB of the GPU for 16 layers (H200), unseen by torch's allocator."""

ROOM = 1.1
"""The pool's first block against what one micro-batch takes: what is lost between blocks that come and go."""

Pass = Callable[[MicroBatch, Tensor | float], Tensor]
"""Forward and backward of a micro-batch on the GPU, and its loss (), detached, times the share given."""


def recordable(layers: DecoderLayers) -> bool:
    """Whether micro-batches of such layers can be recorded: compiled, in bf16, and without capped scores, for other
    kernels than flash attention's are started by the lengths of rows."""
    capped = getattr(layers.core.config.get_text_config(), "attn_logit_softcapping", None)
    return bool(layers.compiled and layers.core.dtype is torch.bfloat16 and not capped)


class Graphs:
    """Runs micro-batches of at most `layers.policy.cuda_graph_max_tokens` tokens as CUDA graphs, others as they are.

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
        self._of: tuple[MemoryPolicy, int, list[int]] | None = None
        self._pool: Any = None

    @property
    def records(self) -> bool:
        """Whether micro-batches that are small enough are filled up and recorded."""
        policy = self.layers.policy
        return policy.cuda_graph_max_tokens > 0 and policy.takes_graphs and recordable(self.layers)

    @property
    def gradient_bytes(self) -> int:
        """What the gradients take that graphs add to."""
        return sum(gradient.nbytes for gradient in self._gradients)

    def run(self, batch: MicroBatch, share: float, work: Pass) -> Tensor:
        """`work(batch, share)`; its gradients are added to the trained weights' `grad`. Raises OutOfMemoryError."""
        if not self.records:
            self.forget()
            return work(batch.to(self.device, non_blocking=True), share)
        now = self.layers.policy, self.layers.turned, [weight.data_ptr() for weight in self.trained]
        if now != self._of:
            self.forget()
            self._of = now
        self._own_gradients()
        if batch.tokens > self.layers.policy.cuda_graph_max_tokens:
            return work(batch.to(self.device, non_blocking=True), share)
        frame = self._frame(Bucket.of(batch, self.layers.policy.cuda_graph_max_tokens, self.longest))
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
        """Put `batch` and `share` where the graph finds them, without waiting for the GPU."""
        filled = self.bucket.filled(batch.to("cpu"))
        self.filled.copy_(filled.pin_memory() if self.filled.is_cuda else filled, non_blocking=True)
        self.share.fill_(share)

    def through(self, work: Pass) -> Tensor:
        """`work` of what lies there."""
        return work(self.bucket.batch_of(self.filled), self.share)
