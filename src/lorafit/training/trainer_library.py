"""transformers' Trainer, imported once and in silence: it imports peft and bitsandbytes, which warns on some CPUs."""

from __future__ import annotations

from lorafit.backbone import redirect_library_logs

with redirect_library_logs():
    from transformers import (
        PrinterCallback,
        Trainer,
        TrainerCallback,
        TrainerControl,
        TrainerState,
        TrainingArguments,
        set_seed,
    )
    from transformers.integrations import get_available_reporting_integrations

__all__ = [
    "PrinterCallback",
    "Trainer",
    "TrainerCallback",
    "TrainerControl",
    "TrainerState",
    "TrainingArguments",
    "get_available_reporting_integrations",
    "set_seed",
]
