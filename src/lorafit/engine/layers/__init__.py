"""Layers: decoder layers compiled, recomputed and offloaded for training."""
