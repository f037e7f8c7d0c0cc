"""Hardware: the GPU or the CPU of a run, detected or named. No torch."""

from lorafit.hardware.detect import hardware_for, hardware_here
from lorafit.hardware.device import Hardware, hardware_named

__all__ = ["Hardware", "hardware_for", "hardware_here", "hardware_named"]
