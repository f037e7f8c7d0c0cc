"""Estimate: the peak memory of a run, component by component, each with its assumption."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lorafit.config.memory_policy import MemoryPolicy
from lorafit.hardware import Hardware
from lorafit.memory.activations import Execution
from lorafit.memory.execution_plan import FRAGMENTATION, ExecutionPlan, plan_execution, uncertainty_of
from lorafit.memory.inputs import PlanInputs
from lorafit.memory.layer_costs import Moment
from lorafit.memory.static_memory import Component, static_memory, total_bytes


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Hold the peak and its components; the true peak lies within ± `uncertainty` of it.

    `kept_bytes` and `recomputed_bytes` are the peak with every activation kept and with all of them recomputed, at
    the same micro-batch. `host_bytes` are pinned in the host's memory meanwhile.
    """

    components: tuple[Component, ...]
    kept_bytes: int
    recomputed_bytes: int
    uncertainty: float
    host_bytes: int = 0

    @property
    def peak_bytes(self) -> int:
        """The sum of the components."""
        return total_bytes(self.components)

    @property
    def needed_bytes(self) -> int:
        """The peak without what only fills room to spare."""
        return total_bytes(part for part in self.components if not part.spare)

    def fits(self, hardware: Hardware) -> bool:
        """True when the expected peak is within the device's memory, or the budget set for it."""
        return self.peak_bytes <= hardware.memory_bytes

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready mapping."""
        return {
            "peak_bytes": self.peak_bytes,
            "uncertainty": self.uncertainty,
            "kept_bytes": self.kept_bytes,
            "recomputed_bytes": self.recomputed_bytes,
            "host_bytes": self.host_bytes,
            "components": [
                {"name": part.name, "bytes": part.size_bytes, "assumes": part.assumes} for part in self.components
            ],
        }


def estimate_memory(inputs: PlanInputs, execution: Execution | None = None) -> MemoryEstimate:
    """Return the peak memory of training in packed micro-batches.

    The memory policy is that of the settings; on auto, the plan's. `execution` stands for another way to run the
    layers than lorafit's. Raises AdapterError for wrong targets.
    """
    return memory_of(plan_execution(inputs, execution), inputs, execution)


def memory_of(plan: ExecutionPlan, inputs: PlanInputs, execution: Execution | None = None) -> MemoryEstimate:
    """Return the peak memory of a run that goes as `plan` says."""
    wide = execution is not None and execution.wide_stream
    policy = plan.policy
    stays = static_memory(
        inputs, wide=wide, host_embeddings=policy.host_embeddings, dequantized_layers=policy.dequantized_layers
    )
    everything = total_bytes(static_memory(inputs, wide=wide))
    return MemoryEstimate(
        components=(*stays, *_passing(plan.moment, policy, plan.tokens, inputs.shape.layers), *_of_graphs(plan)),
        kept_bytes=everything + _passing_bytes(plan.kept),
        recomputed_bytes=everything + _passing_bytes(plan.recomputed),
        uncertainty=uncertainty_of(inputs),
        host_bytes=plan.host_bytes,
    )


def _passing(moment: Moment, policy: MemoryPolicy, tokens: int, layers: int) -> list[Component]:
    size = moment.stays_bytes + moment.in_flight_bytes + moment.working_bytes
    parts = [
        Component(
            "activations", moment.stays_bytes, f"one micro-batch of {tokens:,} tokens: {kept_in_words(policy, layers)}"
        ),
        Component(
            "activations in flight",
            moment.in_flight_bytes,
            "two layers on their way to or from the host; more where there is room",
        ),
        Component("loss or one layer's backward", moment.working_bytes, "the larger of the two, at the fullest moment"),
        Component("fragmentation", round(FRAGMENTATION * size), f"{FRAGMENTATION:.0%} of what comes and goes"),
    ]
    return [part for part in parts if part.size_bytes or part.name != "activations in flight"]


def _of_graphs(plan: ExecutionPlan) -> list[Component]:
    if not plan.graph_bytes:
        return []
    why = "the activations of micro-batches that are recorded, beside those of others"
    return [Component("CUDA graphs", plan.graph_bytes, why, spare=True)]


def _passing_bytes(moment: Moment) -> int:
    return total_bytes(_passing(moment, MemoryPolicy(), 0, 0))


def kept_in_words(policy: MemoryPolicy, layers: int) -> str:
    """Say what a policy keeps on the device of each layer."""
    if policy.offloaded_layers:
        return f"what {layers - policy.offloaded_layers} of {layers} layers keep there until their backward pass"
    if policy.recompute_layers == layers:
        return "each layer's input; the rest is recomputed"
    parts = [
        f"of {policy.recompute_layers} layers their input" if policy.recompute_layers else "",
        f"of {policy.recompute_mlp_layers} all but their feed-forward" if policy.recompute_mlp_layers else "",
    ]
    said = ", ".join(part for part in parts if part)
    return f"{said}, of the rest everything" if said else "everything the backward pass needs"
