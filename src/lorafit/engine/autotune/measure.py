"""Measure: bytes and seconds of one decoder layer on this GPU, at each level of the policy."""

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
    """Hold one layer's cost at one level: bytes saved, bytes its backward needs, and seconds.

    `launch_s` is the processor's time to start one pass's kernels; no pass can be shorter.
    """

    saved_bytes: int
    working_bytes: int
    forward_s: float
    backward_s: float
    launch_s: float


@dataclass(frozen=True, slots=True)
class Products:
    """Hold the projections into one layer's MLP: bytes of their outputs, and seconds to compute them."""

    size_bytes: int
    seconds: float

    def left_out_of(self, keep: LevelCost) -> LevelCost:
        """Return the cost of a layer that recomputes them, from that of one that keeps them."""
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
    """Compile the first decoder layer at `level` and return its cost within `run_model`, on the current CUDA device.

    `run_model` runs the model in training mode; it is left when the first layer has been measured. `meanwhile` is
    called right before that, so that its work runs beside the compiler's. None when that layer alone does not
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
    """Return the products that level `feed_forward` recomputes in the first layer, for `tokens` tokens.

    None where they have to be measured: experts, and MLPs without one or two linears into them.
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
    """Bytes a second from the GPU to pinned host memory and back, both ways busy at once."""
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
    """Median seconds of `work` on the GPU."""
    times = []
    for _ in range(REPEATS + 1):
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begun.record()
        work()
        ended.record()
        torch.cuda.synchronize()
        times.append(begun.elapsed_time(ended) / 1e3)
    return sorted(times[1:])[REPEATS // 2]
