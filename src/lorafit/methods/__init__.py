"""methods: the ways to make a base trainable, and to keep the trained weights."""

from lorafit.methods.method import Method, MethodSnapshot, TrainedWeights
from lorafit.methods.registry import METHODS, method_of

__all__ = ["METHODS", "Method", "MethodSnapshot", "TrainedWeights", "method_of"]
