"""Forecast: the memory, time and cost of a run, with their assumptions."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lorafit.config import RunConfig
from lorafit.config.foreign_text import at_least, at_most
from lorafit.findings import Finding, Severity
from lorafit.hardware import Hardware, hardware_named
from lorafit.hardware.device import CORE_GFLOPS_RANGE, PRICES_AS_OF
from lorafit.memory.execution_plan import (
    FRAGMENTATION,
    UNCERTAINTY,
    ExecutionPlan,
    MemoryEstimate,
    memory_of,
    plan_execution,
)
from lorafit.memory.footprint import CUDA_CONTEXT_BYTES, Component, Execution, Trained, activations, execution_of
from lorafit.memory.inputs import WIDTH, DataStats, PlanInputs
from lorafit.planning.several_gpus import communication_s, several_in_words
from lorafit.shapes import ModelShape

PREDICTED_SPREAD = (0.85, 1.6)
"""Range of compiled layers' time, relative to the predicted time."""
CUDA_UTILISATION = (0.18, 0.45)
"""Share of the GPU's 16-bit peak that eager layers reach. It was 0.21 at 2,048 tokens and 0.42 at 8,192 (8B, H200)."""
LAUNCH_MS_PER_LAYER = (2.0, 9.0)
"""Least milliseconds of a micro-batch per eager layer, forward and backward, for launching kernels. An H200 with a slow
CPU took 9 ms a layer for any number of tokens."""
LOAD_GBS = (0.3, 2.0)
START_S = (5.0, 25.0)
"""Rate of loading the base in GB/s of its 16-bit size, and seconds of imports."""
BYTES_PER_PARAMETER = 16
"""Bytes of a parameter in full fine-tuning. They are bf16 weight and gradient (2 + 2), fp32 master weight (4) and two
fp32 moments of AdamW (8)."""
USABLE = 0.8
LEAST_GPUS = 2
REFERENCE_GPU = "H100"
"""GPU for which full fine-tuning is planned on a machine without one."""
REASON = "weights, gradients and moments do not fit here; the recipe is for more GPUs"
FULL_OPTIMIZERS = ("adamw", "adamw_8bit", "paged_adamw_8bit")
"""Optimizers of full fine-tuning, the best first. The first keeps fp32 master weights and moments; the second rounds
16-bit weights stochastically and has moments in 8 bits, on CUDA. The third has these in host memory and updates within
the backward pass, so that no gradients stay; it is for one GPU, and clips weight by weight."""


@dataclass(frozen=True, slots=True)
class Duration:
    """Hold the duration of the whole run.

    Attributes:
        time_s: Seconds (low, high).
        steps: Optimizer steps.
        tokens: Trained tokens.
        assumes: Assumptions behind time and price.
    """

    time_s: tuple[float, float]
    steps: int
    tokens: int
    assumes: tuple[str, ...]

    def cost_usd(self, hardware: Hardware, count: int = 1) -> tuple[float, float]:
        """Return the run's price (low, high) at the hardware's assumed price range."""
        low, high = hardware.usd_per_hour
        return self.time_s[0] / 3600 * low * count, self.time_s[1] / 3600 * high * count


def steps_of(config: RunConfig, stats: DataStats) -> int:
    """Return the optimizer steps of a run over the rows of `stats`."""
    return config.total_steps(max(1, math.ceil(stats.rows / config.examples_per_step)))


def estimate_duration(inputs: PlanInputs, plan: ExecutionPlan) -> Duration:
    """Return the time of training, evaluations and start-up under an execution plan."""
    steps = steps_of(inputs.config, inputs.stats)
    held_out = round(inputs.stats.holdout_rows * inputs.stats.mean_tokens * _evaluations(inputs, steps) / inputs.gpus)
    if inputs.on_cuda and execution_of(inputs).fused:
        low, high = _predicted(plan, steps, held_out)
        assumes = f"{plan.tokens_per_s:,.0f} tokens/s predicted from the GPU's data sheet"
    else:
        low, high = _eager(inputs, plan, steps, held_out)
        assumes = _speed_in_words(inputs.hardware)
    summing = steps * communication_s(inputs, plan)
    low, high = low + summing * PREDICTED_SPREAD[0], high + summing * PREDICTED_SPREAD[1]
    load = 2 * inputs.shape.parameters / 1e9
    time_s = (low + START_S[0] + load / LOAD_GBS[1], high + START_S[1] + load / LOAD_GBS[0])
    assumed = (assumes, _price_in_words(inputs.hardware), several_in_words(inputs, plan))
    return Duration(time_s, steps, _trained_tokens(inputs, steps), tuple(filter(None, assumed)))


def _trained_tokens(inputs: PlanInputs, steps: int) -> int:
    rows = min(inputs.config.examples_per_step, max(inputs.stats.rows, 1))
    return round(steps * rows * inputs.stats.mean_tokens)


def _predicted(plan: ExecutionPlan, steps: int, held_out: int) -> tuple[float, float]:
    """Return the seconds of compiled layers, from the plan's own prediction."""
    costs = plan.costs
    forward = (costs.layers * costs.forward_s + costs.loss_s) / plan.tokens
    seconds = steps * plan.step_s + held_out * forward
    low, high = (seconds * share for share in PREDICTED_SPREAD)
    return low, high


def _eager(inputs: PlanInputs, plan: ExecutionPlan, steps: int, held_out: int) -> tuple[float, float]:
    """Return the seconds of eager layers, from their arithmetic alone."""
    recomputed = _recomputed(plan)
    trained = steps * plan.step_tokens * token_flops(inputs, recomputed)
    flops = trained + held_out * 2 * inputs.shape.active_parameters
    quantized = 1 - plan.policy.dequantized_layers / inputs.shape.layers
    floor = _floor_s(inputs, steps * plan.micro_batches, 2 + recomputed, quantized)
    slow, fast = _speeds(inputs)
    return max(flops / fast, floor[0]), max(flops / slow, floor[1])


def _recomputed(plan: ExecutionPlan) -> float:
    """Return the share of a forward pass that is recomputed."""
    costs, policy = plan.costs, plan.policy
    seconds = (
        policy.recompute_layers * costs.recompute_layer_s + policy.recompute_mlp_layers * costs.recompute_feed_forward_s
    )
    return min(1.0, seconds / (costs.layers * costs.forward_s))


def token_flops(inputs: PlanInputs, recomputed: float) -> float:
    """Return the FLOPs of training on one token.

    The share `recomputed` of the forward pass runs twice. The sum covers the forward and the input's gradient through
    frozen weights, attention over half a row, and the adapters' own gradient.
    """
    shape = inputs.shape
    head = shape.vocab * shape.hidden
    forward = 2 * (shape.active_parameters - head)
    attention = shape.layers * 2 * shape.heads * shape.head_dim * inputs.stats.mean_tokens
    if inputs.is_full:  # the weights' own gradients too
        return (forward + attention) * (3 + recomputed) + 6 * head * inputs.stats.supervised_share
    trained = 4 * head * inputs.stats.supervised_share + 6 * inputs.adapter_parameters
    return forward * (2 + recomputed) + attention * (3 + recomputed) + trained


def _evaluations(inputs: PlanInputs, steps: int) -> int:
    if not inputs.stats.holdout_rows:
        return 0
    every = inputs.config.eval_steps or max(1, math.ceil(inputs.stats.rows / inputs.config.examples_per_step))
    return steps // every


def _speeds(inputs: PlanInputs) -> tuple[float, float]:
    """Return the range of FLOP/s (low, high)."""
    narrow, hardware = inputs.width == 2, inputs.hardware
    if not inputs.on_cuda:
        slowed = 0.25 if narrow and not hardware.bf16 else 1.0
        low, high = (hardware.cores * gflops * 1e9 * slowed for gflops in CORE_GFLOPS_RANGE)
        return low, high
    slowed = 1.0 if narrow else 1 / 8
    low, high = (hardware.tflops_bf16 * 1e12 * share * slowed for share in CUDA_UTILISATION)
    return low, high


def _floor_s(inputs: PlanInputs, batches: int, passes: float, quantized: float) -> tuple[float, float]:
    """Return the least seconds (low, high) of `batches` micro-batches.

    They are kernel launches, and dequantizing the share `quantized` of the weights.
    """
    if not inputs.on_cuda:
        return 0.0, 0.0
    shape, hardware = inputs.shape, inputs.hardware
    dequantize_s = passes * quantized * shape.packed_parameters * 4.5 / (hardware.bandwidth_gbs * 1e9)
    dequantize_s = dequantize_s if inputs.in_4_bits else 0.0
    low, high = (batches * (shape.layers * ms / 1000 * passes / 2 + dequantize_s) for ms in LAUNCH_MS_PER_LAYER)
    return low, high


def _speed_in_words(hardware: Hardware) -> str:
    if hardware.kind == "cpu":
        return f"{hardware.cores} cores at {CORE_GFLOPS_RANGE[0]:.0f}–{CORE_GFLOPS_RANGE[1]:.0f} GFLOP/s each"
    low, high = CUDA_UTILISATION
    return f"{low:.0%}–{high:.0%} of the GPU's {hardware.tflops_bf16:.0f} TFLOP/s in 16 bits"


def _price_in_words(hardware: Hardware) -> str:
    low, high = hardware.usd_per_hour
    return f"{low:.2f}–{high:.2f} USD an hour (assumed, {PRICES_AS_OF})"


@dataclass(frozen=True, slots=True)
class Forecast:
    """Hold the memory and duration of a run.

    Attributes:
        hardware: Device of the run.
        gpus: Number of devices.
        memory: Peak memory of each device.
        duration: Duration of the whole run.
    """

    hardware: Hardware
    gpus: int
    memory: MemoryEstimate
    duration: Duration

    @property
    def cost_usd(self) -> tuple[float, float]:
        """Price of the run (low, high)."""
        return self.duration.cost_usd(self.hardware, self.gpus)


def forecast(inputs: PlanInputs, *, full: bool = False) -> Forecast:
    """Return the forecast of training by the settings, or with `full` that of training every weight.

    The latter takes the GPUs asked for if everything fits, or else as many as it needs.
    """
    if full:
        asked = full_inputs(inputs)
        here = forecast(asked)
        if here.memory.fits(here.hardware):
            return here
        inputs = inputs.on(full_gpu(inputs.hardware))
        gpus = max(gpus_needed(inputs.shape, inputs.hardware), asked.gpus + 1)
        return Forecast(inputs.hardware, gpus, full_memory(inputs, gpus), full_duration(inputs, gpus))
    plan = plan_execution(inputs)
    return Forecast(inputs.hardware, inputs.gpus, memory_of(plan, inputs), estimate_duration(inputs, plan))


def full_inputs(inputs: PlanInputs) -> PlanInputs:
    """Return the inputs for training every weight on this device, with the most accurate optimizer that fits."""
    settings = {"method": "full", "quantization": "none"}
    if inputs.compute not in ("bf16", "fp32"):
        settings["compute"] = "bf16" if inputs.hardware.bf16 else "fp32"
    inputs = inputs.with_settings(**settings)
    if inputs.config.optimizer != "auto":
        return inputs
    last = (3 if inputs.shards == 1 else 2) if inputs.on_cuda and inputs.width < WIDTH["fp32"] else 1
    kinds = FULL_OPTIMIZERS[:last]
    choices = [inputs.with_settings(optimizer=kind) for kind in kinds]
    return next((one for one in choices if _fits_surely(one)), choices[-1])


def _fits_surely(inputs: PlanInputs) -> bool:
    """Return True if the peak fits with the error of its estimate, and the host's share as well."""
    memory = memory_of(plan_execution(inputs), inputs)
    on_host = inputs.host_moment_bytes <= inputs.hardware.host_bytes
    return on_host and memory.peak_bytes * (1 + memory.uncertainty) <= inputs.hardware.memory_bytes


def full_gpu(hardware: Hardware) -> Hardware:
    """Return the GPU to plan full fine-tuning for: `hardware`, or REFERENCE_GPU instead of a CPU."""
    return hardware if hardware.kind == "cuda" else hardware_named(REFERENCE_GPU)


def gpus_needed(shape: ModelShape, gpu: Hardware) -> int:
    """Return the number of GPUs that hold sharded weights, gradients and optimizer.

    These may take the share USABLE of each GPU's memory.
    """
    return max(LEAST_GPUS, math.ceil(shape.parameters * BYTES_PER_PARAMETER / (USABLE * gpu.memory_bytes)))


def full_memory(inputs: PlanInputs, gpus: int) -> MemoryEstimate:
    """Return the peak memory of each of `gpus` GPUs, with everything sharded and activations recomputed."""
    shape = inputs.shape
    batch = inputs.micro_batch(inputs.config.max_length)
    live = activations(shape, Trained(), batch, width=2, execution=Execution())
    # training every weight also keeps each linear's input, about as much again as the layer keeps
    transient = shape.layers * live.input_bytes + max(live.loss_bytes, live.backward_bytes + 2 * live.layer_bytes)
    sharded = shape.parameters * BYTES_PER_PARAMETER // gpus
    components = (
        Component("weights, gradients, optimizer", sharded, f"16 bytes a parameter over {gpus} GPUs"),
        Component("activations", transient, f"one micro-batch of {batch.tokens:,} tokens, recomputed"),
        Component("fragmentation", round(FRAGMENTATION * transient), f"{FRAGMENTATION:.0%} of temporary memory"),
        Component("CUDA context", CUDA_CONTEXT_BYTES, "driver, kernels and workspaces"),
    )
    peak = sum(component.size_bytes for component in components)
    return MemoryEstimate(components, kept_bytes=peak, recomputed_bytes=peak, uncertainty=UNCERTAINTY)


def full_duration(inputs: PlanInputs, gpus: int) -> Duration:
    """Return the duration on `gpus` GPUs.

    Forward, recompute and both gradients take 8 FLOPs a weight and token.
    """
    steps = steps_of(inputs.config, inputs.stats)
    tokens = _trained_tokens(inputs, steps)
    flops = 8 * inputs.shape.active_parameters * tokens
    slow, fast = (gpus * inputs.hardware.tflops_bf16 * 1e12 * share for share in CUDA_UTILISATION)
    time_s = (flops / fast + START_S[0], flops / slow + START_S[1])
    return Duration(time_s, steps, tokens, (f"{gpus} × {inputs.hardware.name}, at the price of all of them",))


def too_large_for_one(inputs: PlanInputs, gpus: int) -> Finding:
    """Return the finding that full fine-tuning does not fit here, with settings that do; it fits `gpus` GPUs."""
    alone, has = full_inputs(inputs), inputs.hardware
    peak = memory_of(plan_execution(alone), alone).peak_bytes
    where = "one device" if alone.gpus == 1 else f"each of {alone.gpus} GPUs"
    more = f"set gpus: {gpus} on a machine that has them, or " if has.kind == "cuda" else ""
    return Finding(
        "P0",
        Severity.ERROR,
        f"full fine-tuning needs about {at_least(peak)} on {where}, and {has.name} has {at_most(has.memory_bytes)}",
        where="method",
        why=REASON,
        fix=f"{more}set method: lora and quantization: nf4 to train an adapter instead, or name a larger GPU with gpu",
    )
