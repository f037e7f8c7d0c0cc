"""Shapes: the sizes and projections of a model, from its config.json. No torch."""

from lorafit.shapes.shape import ModelShape, Projection, resolve_targets

__all__ = ["ModelShape", "Projection", "resolve_targets"]
