"""Decoder layers as training runs them: compiled, recomputed, offloaded."""
