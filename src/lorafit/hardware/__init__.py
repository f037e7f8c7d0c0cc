"""Hardware: the GPU or the CPU of a run, detected or named. No torch."""

from lorafit.hardware.detect import detect_hardware, hardware_for, hardware_here
from lorafit.hardware.device import Hardware, hardware_named

__all__ = ["Hardware", "detect_hardware", "hardware_for", "hardware_here", "hardware_named"]
