"""Training methods: how a base becomes trainable, and how what was trained is kept."""

from lorafit.methods.method import Method, MethodSnapshot

__all__ = ["Method", "MethodSnapshot"]
