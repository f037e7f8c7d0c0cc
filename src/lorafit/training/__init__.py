"""training: an explicit loop over packed steps, with its checkpoints, guards and logs."""

from lorafit.training.batches import StepDataset, largest_micro_batch, largest_within
from lorafit.training.checkpoints.folder import Checkpoint, clear_unfinished, newest_whole, set_aside
from lorafit.training.checkpoints.snapshot import ADAPTER
from lorafit.training.guards.memory_retry import TunedMemory
from lorafit.training.logging.progress import StepProgress, TrainingProgress
from lorafit.training.logging.run_logs import EventLog, MetricsLog, RunEvent
from lorafit.training.loop import TrainingLoop
from lorafit.training.schedule import OneByOne, Schedule, autocast_dtype, deterministic
from lorafit.training.transformers_parts import (
    TrainerCallback,
    get_available_reporting_integrations,
    total_steps,
    training_arguments,
)

__all__ = [
    "ADAPTER",
    "Checkpoint",
    "EventLog",
    "MetricsLog",
    "OneByOne",
    "RunEvent",
    "Schedule",
    "StepDataset",
    "StepProgress",
    "TrainerCallback",
    "TrainingLoop",
    "TrainingProgress",
    "TunedMemory",
    "autocast_dtype",
    "clear_unfinished",
    "deterministic",
    "get_available_reporting_integrations",
    "largest_micro_batch",
    "largest_within",
    "newest_whole",
    "set_aside",
    "total_steps",
    "training_arguments",
]
