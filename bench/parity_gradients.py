"""One step's adapter gradient of bench/parity.py: lorafit's and the reference's, each beside the same in fp32."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import parity_reference as reference
import torch
from transformers import TrainerCallback

ERROR_BOUND = 1.25
"""Of lorafit's distance from fp32 to the reference's: rounding alone moves either by a tenth."""
STIRRED = 0.02
"""Standard deviation of B: at its initial zero, A has no gradient."""

Gradient = Mapping[str, torch.Tensor]


class OneStep(TrainerCallback):
    """Training begins with adapters whose B is not zero; the gradient is that of the last step."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.gradient: dict[str, torch.Tensor] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        for name, weight in model.named_parameters():
            if ".lora_B." in name:
                weight.data.copy_(torch.randn(weight.shape, generator=self.generator) * STIRRED)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.gradient = reference.gradients_of(model)


@dataclass(frozen=True)
class Distances:
    """‖one − other‖ / ‖other‖ over all adapters of one step's gradients."""

    ours_to_exact: float
    theirs_to_exact: float
    ours_to_theirs: float
    alone_to_padded: float

    @classmethod
    def of(cls, ours: Gradient, padded: Gradient, alone: Gradient, exact: Gradient) -> Distances:
        """`padded` and `alone` are the reference's, all rows in one forward and one at a time."""
        return cls(distance(ours, exact), distance(padded, exact), distance(ours, padded), distance(alone, padded))

    @property
    def ratio(self) -> float:
        """How far lorafit is from fp32, to how far the reference is."""
        return self.ours_to_exact / self.theirs_to_exact

    @property
    def agree(self) -> bool:
        """Whether lorafit is within the bound; a gradient that is not finite is not."""
        return self.ratio <= ERROR_BOUND

    def line(self, name: str) -> str:
        """One row of the table."""
        errors = f"{self.ours_to_exact:.2%} | {self.theirs_to_exact:.2%} | {self.ratio:.2f}"
        return f"| {name} | {errors} | {self.ours_to_theirs:.2%} | {self.alone_to_padded:.2%} |"


HEAD = (
    "| one step's adapter gradient | lorafit to fp32 | the reference to fp32 | ratio | lorafit to the reference"
    " | the reference, each row alone to padded |\n|---|---|---|---|---|---|"
)


def distance(one: Gradient, other: Gradient) -> float:
    """‖one − other‖ / ‖other‖, over all adapters together."""
    assert one.keys() == other.keys(), f"adapters differ: {sorted(one.keys() ^ other.keys())[:4]}"
    apart = math.fsum(float((one[name].double() - other[name].double()).square().sum()) for name in other)
    return math.sqrt(apart / math.fsum(float(weight.double().square().sum()) for weight in other.values()))
