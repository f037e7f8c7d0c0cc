"""Full fine-tuning, as far as lorafit knows it: the cards, memory and time that training every weight would take."""

from __future__ import annotations

import math

from lorafit.config import RunConfig
from lorafit.findings import Finding, Severity
from lorafit.planning.activations import Execution, activations
from lorafit.planning.duration import CUDA_UTILISATION, START_S, Duration, steps_of
from lorafit.planning.execution_plan import FRAGMENTATION, UNCERTAINTY
from lorafit.planning.facts import DataFacts
from lorafit.planning.hardware import Hardware, hardware_named
from lorafit.planning.memory import MemoryEstimate
from lorafit.planning.micro_batch import micro_batch
from lorafit.planning.shape import ModelShape
from lorafit.planning.standing import CUDA_CONTEXT_BYTES, Component

BYTES_PER_PARAMETER = 16
"""bf16 weight and gradient (2 + 2), fp32 master weight (4), two fp32 moments of AdamW (8)."""
USABLE = 0.8
LEAST_GPUS = 2
REFERENCE_CARD = "H100"
"""Where there is no card, full fine-tuning is planned for this one."""
LEARNING_RATE = 1e-5
REASON = "training every weight on several GPUs is not built yet; the recipe says what such a run looks like"


def full_card(hardware: Hardware) -> Hardware:
    """The card a full run is planned for: `hardware` itself, unless that is a CPU."""
    return hardware if hardware.kind == "cuda" else hardware_named(REFERENCE_CARD)


def gpus_needed(shape: ModelShape, card: Hardware) -> int:
    """Cards over which weights, gradients and optimizer must be sharded so that they take 80 % of each."""
    return max(LEAST_GPUS, math.ceil(shape.parameters * BYTES_PER_PARAMETER / (USABLE * card.memory_bytes)))


def full_memory(shape: ModelShape, config: RunConfig, card: Hardware, facts: DataFacts) -> MemoryEstimate:
    """The peak of one of `gpus_needed` cards, everything sharded and activations recomputed."""
    gpus = gpus_needed(shape, card)
    batch = micro_batch(config, facts, config.max_tokens)
    live = activations(shape, (), batch, width=2, execution=Execution())
    # training every weight keeps each linear's input: about what the layer keeps anyway
    passing = shape.layers * live.input_bytes + max(live.loss_bytes, live.backward_bytes + 2 * live.layer_bytes)
    sharded = shape.parameters * BYTES_PER_PARAMETER // gpus
    components = (
        Component("weights, gradients, optimizer", sharded, f"16 bytes a parameter over {gpus} cards"),
        Component("activations", passing, f"one micro-batch of {batch.tokens:,} tokens, recomputed"),
        Component("fragmentation", round(FRAGMENTATION * passing), f"{FRAGMENTATION:.0%} of what comes and goes"),
        Component("CUDA context", CUDA_CONTEXT_BYTES, "driver, kernels and workspaces"),
    )
    peak = sum(component.size_bytes for component in components)
    return MemoryEstimate(components, kept_bytes=peak, recomputed_bytes=peak, uncertainty=UNCERTAINTY)


def full_duration(shape: ModelShape, config: RunConfig, card: Hardware, facts: DataFacts) -> Duration:
    """Time on `gpus_needed` cards: forward, recompute, and both gradients (8 FLOPs a weight and token)."""
    gpus = gpus_needed(shape, card)
    steps = steps_of(config, facts)
    tokens = round(steps * min(config.examples_per_step, max(facts.rows, 1)) * facts.mean_tokens)
    flops = 8 * shape.active_parameters * tokens
    slow, fast = (gpus * card.tflops_bf16 * 1e12 * share for share in CUDA_UTILISATION)
    time_s = (flops / fast + START_S[0], flops / slow + START_S[1])
    return Duration(time_s, steps, tokens, (f"{gpus} × {card.name}, and the price of all of them",))


def not_built() -> Finding:
    """Why such a plan does not run, and what does."""
    return Finding(
        "P0",
        Severity.ERROR,
        "the decision matrix asks for full fine-tuning, and lorafit trains adapters",
        where="goal",
        why=REASON,
        fix="set rank: 32 to train an adapter instead, or goal: balanced",
    )
