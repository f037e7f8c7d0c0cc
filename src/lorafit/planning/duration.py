"""How long a run takes and what it costs: a range, with what it assumes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lorafit.config import RunConfig
from lorafit.planning.cards import PRICES_AS_OF
from lorafit.planning.facts import DataFacts
from lorafit.planning.hardware import Hardware
from lorafit.planning.memory import WIDTH, adapter_parameters, compute_of
from lorafit.planning.shape import ModelShape

CUDA_UTILISATION = (0.18, 0.45)
"""Share of the card's 16-bit peak: lorafit's layers reached 0.21 at 2,048 tokens and 0.42 at 8,192 (8B, H200)."""
LAUNCH_MS_PER_LAYER = (2.0, 9.0)
"""Floor of one micro-batch per layer, forward and backward: what starting the kernels takes. An H200 beside a slow
processor took 9 ms a layer however few the tokens."""
CORE_GFLOPS = (25.0, 60.0)
"""fp32 GFLOP/s of one core in training: the 3.5 M-parameter demo base ran 4–8 k tokens/s on two."""
LOAD_GBS = (0.3, 2.0)
START_S = (5.0, 25.0)
"""Importing the libraries and loading the base, at so many GB/s of its 16-bit size."""
PACKED_FILL = 0.9


@dataclass(frozen=True, slots=True)
class Duration:
    """`time_s` (low, high) of the whole run, its optimizer steps, and what that assumes."""

    time_s: tuple[float, float]
    steps: int
    tokens: int
    assumes: tuple[str, ...]

    def cost_usd(self, hardware: Hardware, count: int = 1) -> tuple[float, float]:
        """The run's price (low, high) at the hardware's assumed price range."""
        low, high = hardware.usd_per_hour
        return self.time_s[0] / 3600 * low * count, self.time_s[1] / 3600 * high * count


def steps_of(config: RunConfig, facts: DataFacts) -> int:
    """Optimizer steps: `epochs` times the steps of one, at most `max_steps`."""
    epoch = max(1, math.ceil(facts.rows / config.examples_per_step))
    steps = math.ceil(config.epochs * epoch)
    return min(steps, config.max_steps) if config.max_steps else steps


def estimate_duration(
    shape: ModelShape,
    config: RunConfig,
    hardware: Hardware,
    facts: DataFacts,
    targets: tuple[str, ...],
) -> Duration:
    """Time of training, evaluations and start-up; `config` is the planned one, without autos."""
    steps = steps_of(config, facts)
    step_examples = min(config.examples_per_step, max(facts.rows, 1))
    tokens = round(steps * step_examples * facts.mean_tokens)
    per_token = token_flops(shape, config, facts, targets)
    evaluations = _evaluations(config, facts, steps)
    held_out = facts.holdout_rows * facts.mean_tokens * evaluations
    flops = tokens * per_token + held_out * 2 * shape.active_parameters
    batches = steps * math.ceil(step_examples * facts.mean_tokens / (config.max_tokens * PACKED_FILL))
    floor = _floor_s(shape, config, hardware, batches)
    slow, fast = _speeds(config, hardware)
    load = 2 * shape.parameters / 1e9
    low = max(flops / fast, floor[0]) + START_S[0] + load / LOAD_GBS[1]
    high = max(flops / slow, floor[1]) + START_S[1] + load / LOAD_GBS[0]
    return Duration((low, high), steps, tokens, _assumptions(config, hardware))


def token_flops(shape: ModelShape, config: RunConfig, facts: DataFacts, targets: tuple[str, ...]) -> float:
    """FLOPs of training on one token: forward and the gradient of the input, both through frozen weights,
    attention over half a row, the adapters' own gradient, and a second forward where activations are recomputed."""
    head = shape.vocab * shape.hidden
    forward = 2 * (shape.active_parameters - head)
    share = facts.supervised_tokens / facts.tokens if facts.tokens else 1.0
    attention = shape.layers * 2 * shape.heads * shape.head_dim * facts.mean_tokens
    recompute = 0 if config.gradient_checkpointing == "off" else 1
    adapters = 6 * adapter_parameters(shape, targets, config.rank)
    return forward * (2 + recompute) + attention * (3 + recompute) + 4 * head * share + adapters


def _evaluations(config: RunConfig, facts: DataFacts, steps: int) -> int:
    if not facts.holdout_rows:
        return 0
    every = config.eval_steps or max(1, math.ceil(facts.rows / config.examples_per_step))
    return steps // every


def _speeds(config: RunConfig, hardware: Hardware) -> tuple[float, float]:
    """FLOP/s, low and high."""
    narrow = WIDTH[compute_of(config, hardware)] == 2
    if hardware.kind == "cpu":
        slowed = 0.25 if narrow and not hardware.bf16 else 1.0
        return tuple(hardware.cores * gflops * 1e9 * slowed for gflops in CORE_GFLOPS)  # type: ignore[return-value]
    slowed = 1.0 if narrow else 1 / 8
    return tuple(hardware.tflops_bf16 * 1e12 * share * slowed for share in CUDA_UTILISATION)  # type: ignore[return-value]


def _floor_s(shape: ModelShape, config: RunConfig, hardware: Hardware, batches: int) -> tuple[float, float]:
    """Seconds that `batches` micro-batches take however few tokens they hold: kernel starts, and unpacking NF4."""
    if hardware.kind == "cpu":
        return 0.0, 0.0
    passes = 2 if config.gradient_checkpointing == "off" else 3
    unpack = passes * shape.linear_parameters * 4.5 / (hardware.bandwidth_gbs * 1e9)
    unpack = unpack if config.quantization == "nf4" else 0.0
    low, high = (batches * (shape.layers * ms / 1000 * passes / 2 + unpack) for ms in LAUNCH_MS_PER_LAYER)
    return low, high


def _assumptions(config: RunConfig, hardware: Hardware) -> tuple[str, ...]:
    low, high = hardware.usd_per_hour
    price = f"{low:.2f}–{high:.2f} USD an hour (assumed, {PRICES_AS_OF})"
    if hardware.kind == "cpu":
        speed = f"{hardware.cores} cores at {CORE_GFLOPS[0]:.0f}–{CORE_GFLOPS[1]:.0f} GFLOP/s each"
        return speed, price
    low_share, high_share = CUDA_UTILISATION
    peak = f"{hardware.tflops_bf16:.0f} TFLOP/s"
    return f"{low_share:.0%}–{high_share:.0%} of the card's {peak} in 16 bits", price
