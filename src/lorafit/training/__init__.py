"""Training: a thin Trainer over packed steps, its checkpoints, and one callback per file."""

from lorafit.training.arguments import total_steps, training_arguments
from lorafit.training.callbacks import FiniteGuard, MetricsLog, StepProgress, TrainingProgress
from lorafit.training.steps import StepDataset, pack_rows
from lorafit.training.trainer import LorafitTrainer

__all__ = [
    "FiniteGuard",
    "LorafitTrainer",
    "MetricsLog",
    "StepProgress",
    "StepDataset",
    "TrainingProgress",
    "pack_rows",
    "total_steps",
    "training_arguments",
]
