"""Shapes: the sizes and projections of a model, from its config.json. No torch."""

from lorafit.shapes.projection import Projection
from lorafit.shapes.shape import ModelShape
from lorafit.shapes.targets import resolve_targets, targets_note

__all__ = ["ModelShape", "Projection", "resolve_targets", "targets_note"]
