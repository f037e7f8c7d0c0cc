"""training: an explicit loop over packed steps, with its checkpoints, guards and logs."""

from lorafit.training.batches import Layout, StepDataset, dealt, largest_micro_batch, largest_within
from lorafit.training.guards.memory_retry import TunedMemory
from lorafit.training.logging.progress import StepProgress
from lorafit.training.logging.run_logs import EventLog, MetricsLog, RunEvent
from lorafit.training.loop import TrainingLoop
from lorafit.training.schedule import OneByOne, autocast_dtype, deterministic
from lorafit.training.transformers_parts import (
    TrainerCallback,
    require_trackers,
    total_steps,
    training_arguments,
)

__all__ = [
    "EventLog",
    "Layout",
    "MetricsLog",
    "OneByOne",
    "RunEvent",
    "StepDataset",
    "StepProgress",
    "TrainerCallback",
    "TrainingLoop",
    "TunedMemory",
    "autocast_dtype",
    "dealt",
    "deterministic",
    "largest_micro_batch",
    "largest_within",
    "require_trackers",
    "total_steps",
    "training_arguments",
]
