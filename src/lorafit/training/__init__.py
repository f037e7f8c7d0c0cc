"""training: an explicit loop over packed steps, with its checkpoints, guards and logs."""

from lorafit.training.batches import Layout, MicroBatchSearch, StepDataset, dealt
from lorafit.training.guards.memory_retry import TunedMemory
from lorafit.training.logging.progress import StepProgress
from lorafit.training.logging.run_logs import EventLog, MetricsLog, RunEvent
from lorafit.training.loop import TrainingLoop
from lorafit.training.run_context import RunContext
from lorafit.training.schedule import OneByOne, autocast_dtype, deterministic
from lorafit.training.transformers_parts import (
    TrainerCallback,
    require_trackers,
    training_arguments,
)

__all__ = [
    "EventLog",
    "Layout",
    "MetricsLog",
    "MicroBatchSearch",
    "OneByOne",
    "RunContext",
    "RunEvent",
    "StepDataset",
    "StepProgress",
    "TrainerCallback",
    "TrainingLoop",
    "TunedMemory",
    "autocast_dtype",
    "dealt",
    "deterministic",
    "require_trackers",
    "training_arguments",
]
