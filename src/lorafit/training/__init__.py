"""Training: a thin Trainer over packed steps, its checkpoints, and one callback per file."""

from lorafit.training.allocator_watch import AllocatorWatch
from lorafit.training.arguments import total_steps, training_arguments, without_checkpointing
from lorafit.training.callbacks import MetricsLog, StepProgress, TrainingProgress
from lorafit.training.checkpoint import Checkpoint
from lorafit.training.checkpoint_snapshot import ADAPTER
from lorafit.training.deterministic import deterministic
from lorafit.training.events import EventLog, RunEvent
from lorafit.training.largest_micro_batch import largest_micro_batch, largest_within
from lorafit.training.resume import clear_unfinished, newest_whole, set_aside
from lorafit.training.steps import StepDataset, pack_rows
from lorafit.training.stop_signals import StopSignals
from lorafit.training.trainer import LorafitTrainer

__all__ = [
    "AllocatorWatch",
    "ADAPTER",
    "Checkpoint",
    "EventLog",
    "LorafitTrainer",
    "MetricsLog",
    "RunEvent",
    "StepDataset",
    "StepProgress",
    "StopSignals",
    "TrainingProgress",
    "clear_unfinished",
    "deterministic",
    "largest_micro_batch",
    "largest_within",
    "newest_whole",
    "pack_rows",
    "set_aside",
    "total_steps",
    "training_arguments",
    "without_checkpointing",
]
