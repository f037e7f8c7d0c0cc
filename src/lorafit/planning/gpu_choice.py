"""gpu_choice: the number of GPUs of a run whose settings name none."""

from __future__ import annotations

from lorafit.hardware import Hardware
from lorafit.memory import DataStats
from lorafit.planning.decisions import Decision
from lorafit.planning.plan import Plan

LEAST_GAIN = 1.25
"""Least ratio of the whole run's times at which several GPUs are taken unasked."""
START_S = 20.0
"""Seconds by which several processes start later than one: imports beside each other, and their first meeting."""
TRAINED = ("method", "rank", "alpha", "quantization", "lr")
"""Decisions that change what a run trains. The number of GPUs must not change them."""


def most_gpus(hardware: Hardware, stats: DataStats, examples_per_step: int) -> int:
    """Return the most GPUs that a run may take unasked: each has a row of every step."""
    return max(1, min(hardware.idle_count, examples_per_step, stats.rows))


def choose_gpus(alone: Plan, together: Plan) -> Decision:
    """Return the number of GPUs by the plans for one and for several, with its reason.

    Several are taken where they are faster by LEAST_GAIN and train the same, or where one does not suffice.
    """
    count, hardware = together.gpus, alone.hardware
    if count == 1:
        return Decision("gpus", 1, _why_one(hardware))
    if alone.inputs.config.deterministic:
        return Decision("gpus", 1, "deterministic asks for the bits of one GPU")
    if together.blocked:
        return Decision("gpus", 1, f"the plan for {count} GPUs has errors")
    if alone.blocked:
        return Decision("gpus", count, "one GPU does not suffice")
    one, several = alone.settings(), together.settings()
    changed = [key for key in TRAINED if one.get(key) != several.get(key)]
    if changed:
        return Decision("gpus", 1, f"{count} GPUs would change {' and '.join(changed)}")
    gain = _seconds(alone) / (_seconds(together) + START_S)
    if gain < LEAST_GAIN:
        return Decision("gpus", 1, f"{count} GPUs would be {gain:.1f}x one by the plan")
    return Decision("gpus", count, f"{gain:.1f}x one by the plan")


def _why_one(hardware: Hardware) -> str:
    if hardware.idle_count < hardware.count:
        return f"the {hardware.count} visible GPUs differ, or one is in use"
    return "a step has one row"


def _seconds(plan: Plan) -> float:
    """Return the middle of the predicted seconds of the whole run."""
    return sum(plan.time_s) / 2
