"""How long a run takes and what it costs: a range, with what it assumes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lorafit.config import RunConfig
from lorafit.planning.activations import execution_of
from lorafit.planning.cards import PRICES_AS_OF
from lorafit.planning.execution_plan import ExecutionPlan
from lorafit.planning.facts import DataFacts
from lorafit.planning.hardware import CORE_GFLOPS_RANGE, Hardware
from lorafit.planning.shape import ModelShape
from lorafit.planning.standing import WIDTH, adapter_parameters, compute_of
from lorafit.planning.targets import resolve_targets

PREDICTED_SPREAD = (0.85, 1.6)
"""What compiled layers may take, of the predicted time: data sheets and this card's measurements, others' not."""
CUDA_UTILISATION = (0.18, 0.45)
"""Share of the card's 16-bit peak of eager layers: 0.21 at 2,048 tokens and 0.42 at 8,192 (8B, H200)."""
LAUNCH_MS_PER_LAYER = (2.0, 9.0)
"""Floor of one micro-batch per eager layer, forward and backward: what starting the kernels takes. An H200 beside a
slow processor took 9 ms a layer however few the tokens."""
LOAD_GBS = (0.3, 2.0)
START_S = (5.0, 25.0)
"""Importing the libraries and loading the base, at so many GB/s of its 16-bit size."""


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
    shape: ModelShape, config: RunConfig, hardware: Hardware, facts: DataFacts, plan: ExecutionPlan
) -> Duration:
    """Time of training, evaluations and start-up of a run that goes as `plan` says."""
    steps = steps_of(config, facts)
    tokens = round(steps * min(config.examples_per_step, max(facts.rows, 1)) * facts.mean_tokens)
    held_out = round(facts.holdout_rows * facts.mean_tokens * _evaluations(config, facts, steps))
    if hardware.kind == "cuda" and execution_of(config, hardware).fused:
        low, high = _predicted(plan, steps, held_out)
        assumes = f"{plan.tokens_per_s:,.0f} tokens/s predicted from the card's data sheet"
    else:
        low, high = _eager(shape, config, hardware, facts, plan, steps, held_out)
        assumes = _speed_in_words(hardware)
    load = 2 * shape.parameters / 1e9
    time_s = (low + START_S[0] + load / LOAD_GBS[1], high + START_S[1] + load / LOAD_GBS[0])
    return Duration(time_s, steps, tokens, (assumes, _price_in_words(hardware)))


def _predicted(plan: ExecutionPlan, steps: int, held_out: int) -> tuple[float, float]:
    """Seconds of compiled layers: the plan's own."""
    costs = plan.costs
    forward = (costs.layers * costs.forward_s + costs.loss_s) / plan.tokens
    seconds = steps * plan.step_s + held_out * forward
    low, high = (seconds * share for share in PREDICTED_SPREAD)
    return low, high


def _eager(
    shape: ModelShape,
    config: RunConfig,
    hardware: Hardware,
    facts: DataFacts,
    plan: ExecutionPlan,
    steps: int,
    held_out: int,
) -> tuple[float, float]:
    """Seconds by arithmetic alone."""
    again = _recomputed(plan)
    flops = steps * plan.step_tokens * token_flops(shape, config, facts, again) + held_out * 2 * shape.active_parameters
    packed = 1 - plan.dial.dense / shape.layers
    floor = _floor_s(shape, config, hardware, steps * plan.micro_batches, 2 + again, packed)
    slow, fast = _speeds(config, hardware)
    return max(flops / fast, floor[0]), max(flops / slow, floor[1])


def _recomputed(plan: ExecutionPlan) -> float:
    """How much of a forward pass runs again."""
    costs, dial = plan.costs, plan.dial
    again = dial.whole * costs.recompute_layer_s + dial.feed_forward * costs.recompute_feed_forward_s
    return min(1.0, again / (costs.layers * costs.forward_s))


def token_flops(shape: ModelShape, config: RunConfig, facts: DataFacts, recomputed: float) -> float:
    """FLOPs of training on one token: forward and the gradient of the input, both through frozen weights,
    attention over half a row, the adapters' own gradient, and the share `recomputed` of a second forward."""
    head = shape.vocab * shape.hidden
    forward = 2 * (shape.active_parameters - head)
    share = facts.supervised_tokens / facts.tokens if facts.tokens else 1.0
    attention = shape.layers * 2 * shape.heads * shape.head_dim * facts.mean_tokens
    adapters = 6 * adapter_parameters(shape, resolve_targets(config.targets, shape), config.rank)
    return forward * (2 + recomputed) + attention * (3 + recomputed) + 4 * head * share + adapters


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
        return tuple(hardware.cores * gflops * 1e9 * slowed for gflops in CORE_GFLOPS_RANGE)  # type: ignore[return-value]
    slowed = 1.0 if narrow else 1 / 8
    return tuple(hardware.tflops_bf16 * 1e12 * share * slowed for share in CUDA_UTILISATION)  # type: ignore[return-value]


def _floor_s(
    shape: ModelShape, config: RunConfig, hardware: Hardware, batches: int, passes: float, packed: float
) -> tuple[float, float]:
    """Seconds that `batches` micro-batches take however few tokens they hold: kernel starts, and unpacking the share
    `packed` of the weights."""
    if hardware.kind == "cpu":
        return 0.0, 0.0
    unpack = passes * packed * shape.linear_parameters * 4.5 / (hardware.bandwidth_gbs * 1e9)
    unpack = unpack if config.quantization == "nf4" else 0.0
    low, high = (batches * (shape.layers * ms / 1000 * passes / 2 + unpack) for ms in LAUNCH_MS_PER_LAYER)
    return low, high


def _speed_in_words(hardware: Hardware) -> str:
    if hardware.kind == "cpu":
        return f"{hardware.cores} cores at {CORE_GFLOPS_RANGE[0]:.0f}–{CORE_GFLOPS_RANGE[1]:.0f} GFLOP/s each"
    low, high = CUDA_UTILISATION
    return f"{low:.0%}–{high:.0%} of the card's {hardware.tflops_bf16:.0f} TFLOP/s in 16 bits"


def _price_in_words(hardware: Hardware) -> str:
    low, high = hardware.usd_per_hour
    return f"{low:.2f}–{high:.2f} USD an hour (assumed, {PRICES_AS_OF})"
