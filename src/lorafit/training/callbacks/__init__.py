"""Callbacks of the Trainer, one per file."""

from lorafit.training.callbacks.metrics_log import MetricsLog
from lorafit.training.callbacks.progress import StepProgress, TrainingProgress

__all__ = ["MetricsLog", "StepProgress", "TrainingProgress"]
