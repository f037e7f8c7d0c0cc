"""Shapes: the sizes and projections of a model, from its config.json. No torch."""

from lorafit.shapes.dimensions import published_format
from lorafit.shapes.length_limit import length_limit
from lorafit.shapes.projection import Projection
from lorafit.shapes.shape import ModelShape
from lorafit.shapes.targets import expert_rank, experts_note, resolve_targets, targets_note

__all__ = [
    "ModelShape",
    "Projection",
    "expert_rank",
    "experts_note",
    "length_limit",
    "published_format",
    "resolve_targets",
    "targets_note",
]
