"""Fused tensors: parameters that a checkpoint stores in another layout.

Experts are stored one by one, or gate and up projections in one tensor. transformers' own rules make the parameters of
the stored tensors, and their inverses make the stored tensors again.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import WeightConverter, dot_natural_key

from lorafit.errors import BackboneError


@dataclass(frozen=True)
class Fusion:
    """Hold the stored tensors of one parameter, or of several that are stored together.

    Attributes:
        parameters: Names of the model's parameters, in the order of the rule.
        sources: (stored name, the rule's pattern that it matches), in the order of the rule.
        rule: transformers' rule.
        model: The model without weights.
        waiting: Parameters that wait for the others stored with them.
    """

    parameters: tuple[str, ...]
    sources: tuple[tuple[str, str], ...]
    rule: WeightConverter
    model: Any
    waiting: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, parameter: str, found: Mapping[str, str], rule: WeightConverter, model: nn.Module) -> Fusion:
        """Return the fusion of the stored tensors `found`, each with its pattern; `parameter` is the rule's first."""
        first = rule.target_patterns[0]
        names = tuple(parameter.replace(first, target, 1) for target in rule.target_patterns)
        return cls(names, tuple((name, found[name]) for name in sorted(found, key=dot_natural_key)), rule, model)

    def fused(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the parameters made of `tensors`, by stored name.

        Raises BackboneError unless taking them apart again gives the same tensors.
        """
        converter = deepcopy(self.rule)
        for name, pattern in self.sources:
            converter.add_tensor(self.parameters[0], name, pattern, tensors[name])
        made = converter.convert(self.parameters[0], model=self.model, config=self.model.config)
        parameters = {name: _first(made[name]) for name in self.parameters}
        again = self._stored(parameters)
        if not all(torch.equal(again[name], tensors[name]) for name, _ in self.sources):
            what = f"the tensors of {self.parameters[0]} are stored in a layout that cannot be written again"
            raise BackboneError(what, fix="save the base with transformers' save_pretrained, and use that copy")
        return parameters

    def split(self, parameter: str, tensor: Tensor) -> dict[str, Tensor]:
        """Return the stored tensors of `parameter` by name: the inverse of `fused`.

        Of parameters that are stored together, the last one brings them; the others wait and return none.
        """
        self.waiting[parameter] = tensor
        if len(self.waiting) < len(self.parameters):
            return {}
        parameters = {name: self.waiting.pop(name) for name in self.parameters}
        return self._stored(parameters)

    def _stored(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        reverse: Any = self.rule.reverse_transform()
        for name, pattern in zip(self.parameters, reverse.source_patterns, strict=True):
            reverse.add_tensor(self.parameters[0], name, pattern, parameters[name])
        first, _ = reverse.rename_source_key(self.parameters[0])
        parts = reverse.convert(first, model=self.model, config=self.model.config)
        assert len(parts) == len(self.sources), (self.parameters, len(parts), len(self.sources))
        ordered = [_first(parts[name]) for name in sorted(parts, key=dot_natural_key)]
        return {name: part.contiguous() for (name, _), part in zip(self.sources, ordered, strict=True)}


def _first(value: Any) -> Tensor:
    tensor: Tensor = value[0] if isinstance(value, list) else value
    return tensor
