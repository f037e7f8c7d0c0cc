"""CUDA graphs: small micro-batches recorded once and replayed.

The GPU would otherwise wait for the processor to launch their kernels.
"""

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
"""Number of bucket sizes, equally far apart up to the largest.

The sizes of steps with a similar number of examples differ by a share of the largest.
"""
MIN_STEP, MIN_ROWS = 64, 8
BLOCK = 128
"""Factor to which the longest row is rounded up: the rows of a block of attention."""
MAX_BUCKETS = 32
"""Number of buckets that are kept.

A graph takes some 3 MB of the GPU for 16 layers (H200), which torch's allocator does not count.
"""
ARENA_MARGIN = 1.1
"""Ratio of the pool's first block to one micro-batch's memory.

The surplus covers losses between blocks that come and go.
"""


@dataclass(frozen=True, slots=True)
class Bucket:
    """Hold the sizes of a filled micro-batch.

    Attributes:
        tokens: Number of tokens.
        rows: Number of rows.
        longest: Most tokens of a row.
        supervised: Number of supervised tokens.
        even: Whether all rows have `longest` tokens.
    """

    tokens: int
    rows: int
    longest: int
    supervised: int
    even: bool

    @classmethod
    def of(cls, batch: MicroBatch, most: int, longest: int) -> Bucket:
        """Return the bucket of `batch`.

        No bucket has more than `most` tokens, and no row more than `longest`. Rows of one round length, as in
        fixed-length data, make a bucket of their own, because cuDNN supports them.
        """
        require_plain(batch, "a CUDA graph")
        step = _rounded(-(-most // SIZES), MIN_STEP)
        rows, width, *others = on_host(batch.segments.layout).tolist()
        if not others and rows * width == batch.tokens and width % ROUND_WIDTH == 0:
            return cls(batch.tokens, rows, width, _supervised(batch, batch.tokens, step), even=True)
        tokens = _rounded(batch.tokens, step)
        # one more row for the filler, which is shorter than a step
        filled = max(MIN_ROWS, 1 << batch.segments.cu_seqlens.shape[0].bit_length())
        most_of_row = _rounded(max(longest, step), BLOCK)
        return cls(tokens, filled, most_of_row, _supervised(batch, tokens, step), even=False)

    @property
    def size(self) -> int:
        """Return the count of numbers in a filled micro-batch."""
        return 2 * self.tokens + 2 * self.supervised + self.rows + 1

    def filled(self, batch: MicroBatch) -> torch.Tensor:
        """Return `batch`, on the CPU, filled up to `size` numbers.

        The filler is a row of unsupervised tokens, and empty rows. It attends only to itself and has no loss, so it
        adds zeros to the adapters' gradients.
        """
        extra, spare = self.tokens - batch.tokens, self.supervised - batch.supervised
        cu_seqlens = batch.segments.cu_seqlens.numpy()
        parts = (
            _appended(batch.ids[0].numpy(), np.zeros(extra, np.int64)),
            _appended(batch.positions[0].numpy(), np.arange(extra)),
            # different filler tokens, at the end: adding many gradients to one token is slow
            _appended(batch.predictors.numpy(), np.arange(self.tokens - spare, self.tokens)),
            _appended(batch.targets.numpy(), np.full(spare, IGNORED)),
            _appended(cu_seqlens, np.full(self.rows + 1 - len(cu_seqlens), self.tokens)),
        )
        return torch.from_numpy(np.concatenate(parts))

    def batch_of(self, filled: torch.Tensor) -> MicroBatch:
        """Return the micro-batch in `filled` (size,) int64, on its device.

        Its tensors are views, except the cu_seqlens.
        """
        sizes = [self.tokens, self.tokens, self.supervised, self.supervised, self.rows + 1]
        ids, positions, predictors, targets, cu_seqlens = filled.split(sizes)
        # two tensors: the same one twice would recompile the layers
        gather, scatter = (torch.arange(self.tokens, device=filled.device) for _ in range(2))
        # a second, empty group marks that only `cu_seqlens` holds the rows' lengths
        layout = torch.tensor([self.rows, self.longest, *([] if self.even else [0, 0])])
        segments = Segments(cu_seqlens.to(torch.int32), gather, scatter, layout_on(filled.device, layout))
        return MicroBatch(ids[None], positions[None], predictors, targets, segments)


def _supervised(batch: MicroBatch, tokens: int, step: int) -> int:
    """Return the supervised tokens, rounded up to steps twice as large.

    Each size is a graph, and the head's share of the work is small.
    """
    return min(_rounded(max(batch.supervised, 1), 2 * step), tokens)


def _rounded(size: int, step: int) -> int:
    """Return the next multiple of `step`."""
    return -(-size // step) * step


def _appended(values: NDArray[np.integer], more: NDArray[np.integer]) -> NDArray[np.int64]:
    return np.concatenate([values, more]).astype(np.int64)


Pass = Callable[[MicroBatch, Tensor | float], Tensor]
"""Runs forward and backward of a micro-batch on the GPU.

Returns its loss (), detached, times the given share.
"""


def recordable(layers: DecoderLayers) -> bool:
    """Return True if micro-batches of these layers can be recorded.

    Layers must be compiled, in bf16, and without capped scores: other kernels than flash attention's are started by the
    lengths of rows, which a graph cannot know. A graph keeps its gradients in place, so base weights must be frozen.
    """
    ends = [getattr(layers.core, f"get_{end}_embeddings", lambda: None)() for end in ("input", "output")]
    if any(weight.requires_grad for module in ends if module is not None for weight in module.parameters()):
        return False
    capped = getattr(layers.core.config.get_text_config(), "attn_logit_softcapping", None)
    return bool(layers.compiled and layers.core.dtype is torch.bfloat16 and not capped)


class Graphs:
    """Run micro-batches of at most `layers.policy.cuda_graph_max_tokens` tokens as CUDA graphs.

    Larger ones run without. A bucket's first micro-batch runs without a graph, and its second is recorded. All graphs
    share one memory pool, since no two run at once, and add to gradients that stay in place. The pool begins with one
    block of `arena_bytes`: its blocks neither grow (`fixed_blocks`) nor are freed, so each new size would take more.
    Graphs are recorded anew when the version of `layers` changes, or when adapters move. If recording fails, training
    goes on without graphs, and `tell` is called with the reason. Micro-batches are still filled up, so that a resumed
    run that can record has the same bits. The caller handles memory that runs out while recording, like any other.
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
        self._recorded_for: tuple[MemoryPolicy, int, list[int]] | None = None
        self._pool: Any = None

    @property
    def records(self) -> bool:
        """Return True if small micro-batches are filled up and recorded."""
        policy = self.layers.policy
        return policy.cuda_graph_max_tokens > 0 and policy.takes_graphs and recordable(self.layers)

    @property
    def gradient_bytes(self) -> int:
        """Return the bytes of the gradients that graphs add to."""
        return sum(gradient.nbytes for gradient in self._gradients)

    def run(self, batch: MicroBatch, share: float, work: Pass) -> Tensor:
        """Return `work(batch, share)`, and add its gradients to the trained weights' `grad`.

        Raises OutOfMemoryError.
        """
        if not self.records:
            self.forget()
            return work(batch.to(self.device, non_blocking=True), share)
        key = self.layers.policy, self.layers.version, [weight.data_ptr() for weight in self.trained]
        if key != self._recorded_for:
            self.forget()
            self._recorded_for = key
        self._own_gradients()
        if batch.tokens > self.layers.policy.cuda_graph_max_tokens:
            return work(batch.to(self.device, non_blocking=True), share)
        frame = self._frame(Bucket.of(batch, self.layers.policy.cuda_graph_max_tokens, self.longest))
        frame.take(batch, share)
        if frame.seen and frame.graph is None and not self.failed:
            self._record(frame, work)
        frame.seen = True
        if frame.graph is None:  # not recorded yet, or failed: run filled up
            return frame.through(work)
        frame.graph.replay()
        self.replays += 1
        return frame.loss.clone()

    def forget(self) -> None:
        """Drop all graphs and their memory."""
        self._gradients = []
        if self._frames:
            self._finish()
            self._frames.clear()
            self._arena = None
            self._pool = None  # an unused pool cannot be reused while one of its blocks is alive
            release_memory()

    def give_back(self) -> bool:
        """Drop all graphs when memory is short; they are recorded again on their next micro-batch.

        Returns False if there were none.
        """
        held = any(frame.graph is not None for frame in self._frames.values())
        self.forget()
        return held

    def _frame(self, bucket: Bucket) -> _Frame:
        if bucket not in self._frames:
            self._frames[bucket] = _Frame(bucket, self.device)
        self._frames.move_to_end(bucket)
        if len(self._frames) > MAX_BUCKETS:
            self._finish()
            self._frames.popitem(last=False)
        return self._frames[bucket]

    def _finish(self) -> None:
        """Wait for replayed graphs: none may be freed while it runs."""
        if any(frame.graph for frame in self._frames.values()):
            torch.cuda.synchronize(self.device)

    def _own_gradients(self) -> None:
        """Make every trained weight's gradient the tensor that graphs add to, with its present values."""
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
        """Record `frame`; after a failure nothing is recorded any more.

        Raises torch.OutOfMemoryError.
        """
        reason = ""
        try:
            with fixed_blocks(), _restored_on_failure(self.device, lambda: self._pool):
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
        if reason:  # outside of the handler, because the error keeps the recording alive
            self.failed = True
            self.forget()
            self.tell(f"micro-batches cannot be recorded as CUDA graphs ({reason}); they run without")

    def _recorded(self, work: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """Return a graph of `work`, and the result of `work`."""
        graph = torch.cuda.CUDAGraph()
        # other threads page-lock memory and copy meanwhile, which must not fail the recording
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            out = work()
        return graph, out

    def _take_arena(self) -> Tensor:
        block = torch.empty(round(self.arena_bytes * ARENA_MARGIN), dtype=torch.uint8, device=self.device)
        return block[:1].zero_().clone()


@contextlib.contextmanager
def _restored_on_failure(device: torch.device, pool: Callable[[], Any]) -> Iterator[None]:
    """Restore torch's state when a recording inside the block fails.

    torch does not do it, as `CUDAGraph::capture_end` says itself: the random generator and the memory pool would stay
    part of the recording, and the stream would stay its stream. The failed recording's memory stays taken until the
    process ends, in torch up to 2.13 at least (pytorch/pytorch#190348).
    """
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
        with contextlib.suppress(RuntimeError):  # raised if the recording had ended
            torch._C._cuda_endAllocateToPool(device.index or 0, pool())
        raise


class _Frame:
    """Hold one bucket's input tensors, and its graph after it is recorded."""

    def __init__(self, bucket: Bucket, device: torch.device) -> None:
        self.bucket = bucket
        self.filled = torch.zeros(bucket.size, dtype=torch.int64, device=device)
        self.share = torch.zeros((), device=device)
        self.seen = False
        self.graph: torch.cuda.CUDAGraph | None = None
        self.loss = self.share

    def take(self, batch: MicroBatch, share: float) -> None:
        """Copy `batch` and `share` to the graph's inputs, without waiting for the GPU."""
        filled = self.bucket.filled(batch.to("cpu"))
        self.filled.copy_(filled.pin_memory() if self.filled.is_cuda else filled, non_blocking=True)
        self.share.fill_(share)

    def through(self, work: Pass) -> Tensor:
        """Run `work` on the graph's inputs."""
        return work(self.bucket.batch_of(self.filled), self.share)
