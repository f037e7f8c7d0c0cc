"""Shapes: what a model is made of, from its config.json. No torch."""

from lorafit.shapes.shape import ModelShape, Projection, resolve_targets

__all__ = ["ModelShape", "Projection", "resolve_targets"]
