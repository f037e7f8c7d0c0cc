"""What one decoder layer costs on the card at hand: bytes saved and needed, seconds, at each level of the dial."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from lorafit.backbone import FrozenLinear4bit
from lorafit.engine.layers.decoder import DecoderLayers

REPEATS = 3
COPY_BYTES = 1 << 27
MOST_PRODUCTS = 2
"""Gate and up; one where a family fuses them."""


@dataclass(frozen=True, slots=True)
class LevelCost:
    """One layer at one level: bytes saved for the backward, bytes its backward needs beside them, and seconds.

    `launch_s`: of the processor, to start one pass's kernels; no pass can be shorter.
    """

    saved_bytes: int
    working_bytes: int
    forward_s: float
    backward_s: float
    launch_s: float


@dataclass(frozen=True, slots=True)
class Products:
    """The projections into one layer's feed-forward: bytes of what they make, and seconds that making it takes."""

    size_bytes: int
    seconds: float

    def left_out_of(self, keep: LevelCost) -> LevelCost:
        """The cost of the layer that makes them again, from that of the layer that keeps them."""
        return replace(
            keep,
            saved_bytes=keep.saved_bytes - self.size_bytes,
            working_bytes=keep.working_bytes + self.size_bytes,
            backward_s=keep.backward_s + self.seconds,
        )

    def kept_in(self, feed_forward: LevelCost) -> LevelCost:
        """The inverse of `left_out_of`."""
        return Products(-self.size_bytes, -self.seconds).left_out_of(feed_forward)


class _Measured(Exception):
    """The first layer has been measured; the rest of the model need not run."""


def measure_level(
    layers: DecoderLayers, run_model: Callable[[], Any], level: str, meanwhile: Callable[[], object] | None = None
) -> LevelCost | None:
    """Cost of the first decoder layer within `run_model` at `level`, on the current CUDA device; compiles the level.

    `run_model` runs the model in training mode; it is left when the first layer has been measured. `meanwhile` is
    called right before that: what it starts goes on while the compiler works. None when that layer alone does not
    fit the memory.
    """
    found: list[LevelCost] = []

    def observe(run: Any, hidden: torch.Tensor, *rest: Any) -> None:
        layers.observe = None
        if meanwhile is not None:
            meanwhile()
        found.append(_level_cost(partial(run, level), hidden, rest))
        raise _Measured

    layers.observe = observe
    try:
        with layers:
            run_model()
    except (_Measured, torch.OutOfMemoryError):
        pass
    finally:
        layers.observe = None
    return found[0] if found else None


def _level_cost(run: Any, hidden: torch.Tensor, rest: tuple[Any, ...]) -> LevelCost:
    grad = torch.randn_like(hidden)
    times = []
    saved = working = 0
    for _ in range(REPEATS + 1):
        leaf = hidden.detach().requires_grad_()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
        started = time.perf_counter()
        marks[0].record()
        out = run(leaf, *rest)
        marks[1].record()
        saved = torch.cuda.memory_allocated() - before - out.numel() * out.element_size()
        torch.cuda.reset_peak_memory_stats()
        out.backward(grad)
        marks[2].record()
        launched = time.perf_counter() - started
        torch.cuda.synchronize()
        working = torch.cuda.max_memory_allocated() - before - saved
        times.append((marks[0].elapsed_time(marks[1]) / 1e3, marks[1].elapsed_time(marks[2]) / 1e3, launched / 2))
        del out, leaf
    timed = sorted(times[1:])  # the first run compiles
    forward_s, backward_s, launch_s = timed[len(timed) // 2]
    # the layer's input is saved too, but it was there before
    return LevelCost(saved + hidden.numel() * hidden.element_size(), working, forward_s, backward_s, launch_s)


def frozen_linears(layers: DecoderLayers) -> list[FrozenLinear4bit]:
    """The packed linears of the first layer."""
    return [module for module in layers.layers[0].modules() if isinstance(module, FrozenLinear4bit)]


def unpacked_bytes(layers: DecoderLayers) -> int:
    """The most that one of the first layer's packed weights takes while it is unpacked for a product."""
    return max((module.dense_bytes() for module in frozen_linears(layers)), default=0)


def unpack_s(layers: DecoderLayers) -> float:
    """Seconds that unpacking one layer's frozen weights takes, however few the tokens."""
    frozen = frozen_linears(layers)

    def work() -> None:
        for module in frozen:
            module.unpacked()

    return _timed(work) if frozen else 0.0


def feed_forward_products(layers: DecoderLayers, tokens: int) -> Products | None:
    """What level `feed_forward` makes again of the first layer, for `tokens` tokens, on the current CUDA device.

    None where it has to be measured: experts, and whatever is no one or two linears into the feed-forward.
    """
    hidden = layers.core.config.get_text_config().hidden_size
    linears = [module for module in layers.layers[0].modules() if isinstance(module, torch.nn.Linear)]
    into = [linear for linear in linears if linear.in_features == hidden and linear.out_features in layers.widths]
    if not 1 <= len(into) <= MOST_PRODUCTS:
        return None
    dtype = layers.core.dtype
    inputs = torch.randn(1, tokens, hidden, device="cuda", dtype=dtype)

    @torch.no_grad()
    def work() -> None:
        for linear in into:
            linear(inputs)

    return Products(tokens * sum(linear.out_features for linear in into) * dtype.itemsize, _timed(work))


def link_rates() -> tuple[float, float]:
    """Bytes a second from the card to pinned host memory and back, both ways busy at once."""
    here = [torch.empty(COPY_BYTES, device="cuda", dtype=torch.uint8) for _ in range(2)]
    there = [torch.empty(COPY_BYTES, pin_memory=True, dtype=torch.uint8) for _ in range(2)]
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(2)]
    for _ in range(2):  # the first one warms up
        for way, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                marks[way][0].record()
                target, source = (there[0], here[0]) if way == 0 else (here[1], there[1])
                target.copy_(source, non_blocking=True)
                marks[way][1].record()
        torch.cuda.synchronize()
    out, home = (COPY_BYTES / (begun.elapsed_time(ended) / 1e3) for begun, ended in marks)
    return out, home


def _timed(work: Any) -> float:
    """Median seconds of `work` on the card."""
    times = []
    for _ in range(REPEATS + 1):
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begun.record()
        work()
        ended.record()
        torch.cuda.synchronize()
        times.append(begun.elapsed_time(ended) / 1e3)
    return sorted(times[1:])[REPEATS // 2]
