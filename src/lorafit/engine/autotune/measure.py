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
from lorafit.methods.lora.dora import MAGNITUDE

REPEATS = 3
COPY_BYTES = 1 << 27
MAX_MLP_MATMULS = 2
"""Number of projections into an MLP: gate and up, or one if a family fuses them."""


@dataclass(frozen=True, slots=True)
class LevelCost:
    """Hold one layer's cost at one level of the policy.

    Attributes:
        saved_bytes: Bytes saved for the backward.
        working_bytes: Bytes that the backward needs besides.
        forward_s: Seconds of the forward.
        backward_s: Seconds of the backward.
        launch_s: Seconds in which the processor starts one pass's kernels; no pass can be shorter.
    """

    saved_bytes: int
    working_bytes: int
    forward_s: float
    backward_s: float
    launch_s: float


@dataclass(frozen=True, slots=True)
class MlpMatmuls:
    """Hold the cost of the projections into one layer's MLP.

    Attributes:
        size_bytes: Bytes of their outputs.
        seconds: Seconds to compute them.
    """

    size_bytes: int
    seconds: float

    def recomputed(self, keep: LevelCost) -> LevelCost:
        """Return the cost of a layer that recomputes them.

        `keep` is the cost of a layer that keeps them.
        """
        return replace(
            keep,
            saved_bytes=keep.saved_bytes - self.size_bytes,
            working_bytes=keep.working_bytes + self.size_bytes,
            backward_s=keep.backward_s + self.seconds,
        )

    def kept(self, feed_forward: LevelCost) -> LevelCost:
        """Return the cost of a layer that keeps them.

        `feed_forward` is the cost of a layer that recomputes them.
        """
        return MlpMatmuls(-self.size_bytes, -self.seconds).recomputed(feed_forward)


class _LayerMeasured(Exception):
    """Raised after the first layer is measured, to skip the rest of the model."""


def measure_level(
    layers: DecoderLayers, run_model: Callable[[], Any], level: str, on_compile: Callable[[], object] | None = None
) -> LevelCost | None:
    """Compile the first decoder layer at `level`, and return its cost.

    It is measured within `run_model`, on the current CUDA device. `run_model` runs the model in training mode and is
    left after the first layer is measured. `on_compile` is called right before the measurement, so that its work runs
    beside the compiler's. None if the layer alone does not fit into memory.
    """
    found: list[LevelCost] = []

    def observe(run: Any, hidden: torch.Tensor, *rest: Any) -> None:
        layers.observe = None
        if on_compile is not None:
            on_compile()
        found.append(_level_cost(partial(run, level), hidden, rest))
        raise _LayerMeasured

    layers.observe = observe
    try:
        with layers:
            run_model()
    except (_LayerMeasured, torch.OutOfMemoryError):
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
    # the layer's input is saved too, but was allocated before
    return LevelCost(saved + hidden.numel() * hidden.element_size(), working, forward_s, backward_s, launch_s)


def frozen_linears(layers: DecoderLayers) -> list[FrozenLinear4bit]:
    """Return the packed linears of the first layer."""
    return [module for module in layers.layers[0].modules() if isinstance(module, FrozenLinear4bit)]


def dequantized_bytes(layers: DecoderLayers) -> int:
    """Return the bytes of the first layer's largest weight, dequantized for a matmul."""
    return max((module.dense_bytes() for module in frozen_linears(layers)), default=0)


def dequantize_s(layers: DecoderLayers) -> float:
    """Return the seconds of dequantizing one layer's frozen weights, which do not depend on the tokens."""
    frozen = frozen_linears(layers)

    def work() -> None:
        for module in frozen:
            module.unpacked()

    return _timed(work) if frozen else 0.0


def mlp_matmuls(layers: DecoderLayers, tokens: int) -> MlpMatmuls | None:
    """Return the matmuls that level `feed_forward` recomputes in the first layer, for `tokens` tokens.

    None if they must be measured: experts, MLPs without one or two linears into them, and DoRA, which keeps more than
    their outputs.
    """
    hidden, layer = layers.core.config.get_text_config().hidden_size, layers.layers[0]
    linears = {name: module for name, module in layer.named_modules() if isinstance(module, torch.nn.Linear)}
    inner = {
        name: one for name, one in linears.items() if one.in_features == hidden and one.out_features in layers.widths
    }
    scaled = tuple(f"{name.removesuffix('.base_layer')}.{MAGNITUDE}." for name in inner)
    if not 1 <= len(inner) <= MAX_MLP_MATMULS or any(name.startswith(scaled) for name, _ in layer.named_parameters()):
        return None
    into = list(inner.values())
    dtype = layers.core.dtype
    inputs = torch.randn(1, tokens, hidden, device="cuda", dtype=dtype)

    @torch.no_grad()
    def work() -> None:
        for linear in into:
            linear(inputs)

    return MlpMatmuls(tokens * sum(linear.out_features for linear in into) * dtype.itemsize, _timed(work))


def link_rates() -> tuple[float, float]:
    """Return the bytes a second from the GPU to pinned host memory, and back.

    Both ways are busy at once.
    """
    on_gpu = [torch.empty(COPY_BYTES, device="cuda", dtype=torch.uint8) for _ in range(2)]
    on_host = [torch.empty(COPY_BYTES, pin_memory=True, dtype=torch.uint8) for _ in range(2)]
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(2)]
    for _ in range(2):  # the first one warms up
        for way, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                marks[way][0].record()
                target, source = (on_host[0], on_gpu[0]) if way == 0 else (on_gpu[1], on_host[1])
                target.copy_(source, non_blocking=True)
                marks[way][1].record()
        torch.cuda.synchronize()
    to_host, to_gpu = (COPY_BYTES / (begun.elapsed_time(ended) / 1e3) for begun, ended in marks)
    return to_host, to_gpu


def _timed(work: Any) -> float:
    """Return the median seconds of `work` on the GPU."""
    times = []
    for _ in range(REPEATS + 1):
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begun.record()
        work()
        ended.record()
        torch.cuda.synchronize()
        times.append(begun.elapsed_time(ended) / 1e3)
    return sorted(times[1:])[REPEATS // 2]
