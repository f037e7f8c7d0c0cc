"""Training methods: how a base becomes trainable, and how what was trained is kept."""

from lorafit.methods.method import Method, MethodSnapshot, TrainedWeights
from lorafit.methods.registry import METHODS, method_of

__all__ = ["METHODS", "Method", "MethodSnapshot", "TrainedWeights", "method_of"]
