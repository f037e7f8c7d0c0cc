"""Fused tensors: one parameter of experts that a checkpoint stores expert by expert.

transformers' own rules put the stored tensors together, and their inverses take them apart again.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import WeightConverter, dot_natural_key

from lorafit.errors import BackboneError


@dataclass(frozen=True)
class Fusion:
    """Hold the stored tensors of one parameter.

    Attributes:
        parameter: Name of the model's parameter.
        sources: (stored name, the rule's pattern that it matches), in the order of the rule.
        rule: transformers' rule.
        model: The model without weights.
    """

    parameter: str
    sources: tuple[tuple[str, str], ...]
    rule: WeightConverter
    model: Any

    @classmethod
    def of(cls, parameter: str, found: Mapping[str, str], rule: WeightConverter, model: nn.Module) -> Fusion:
        """Return the fusion of the stored tensors `found`, each with its pattern."""
        return cls(parameter, tuple((name, found[name]) for name in sorted(found, key=dot_natural_key)), rule, model)

    def fused(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return the parameter made of `tensors`, by stored name.

        Raises BackboneError unless taking it apart again gives the same tensors.
        """
        converter = deepcopy(self.rule)
        for name, pattern in self.sources:
            converter.add_tensor(self.parameter, name, pattern, tensors[name])
        made = _first(converter.convert(self.parameter, model=self.model, config=self.model.config)[self.parameter])
        again = self.split(made)
        if not all(torch.equal(again[name], tensors[name]) for name, _ in self.sources):
            what = f"the tensors of {self.parameter} are stored in a layout that cannot be written again"
            raise BackboneError(what, fix="save the base with transformers' save_pretrained, and use that copy")
        return made

    def split(self, parameter: Tensor) -> dict[str, Tensor]:
        """Return the tensors of `parameter` by stored name: the inverse of `fused`."""
        reverse: Any = self.rule.reverse_transform()
        reverse.add_tensor(self.parameter, self.parameter, reverse.source_patterns[0], parameter)
        first, _ = reverse.rename_source_key(self.parameter)
        parts = reverse.convert(first, model=self.model, config=self.model.config)
        assert len(parts) == len(self.sources), (self.parameter, len(parts), len(self.sources))
        ordered = [_first(parts[name]) for name in sorted(parts, key=dot_natural_key)]
        return {name: part.contiguous() for (name, _), part in zip(self.sources, ordered, strict=True)}


def _first(value: Any) -> Tensor:
    tensor: Tensor = value[0] if isinstance(value, list) else value
    return tensor
