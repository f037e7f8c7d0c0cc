"""lora: LoRA adapters, attached, saved, loaded and merged. Only this package imports peft."""

from lorafit.methods.lora.adapter_folder import (
    AdapterSnapshot,
    Delta,
    Deltas,
    load_adapter,
    restore_adapter,
    save_adapter,
)
from lorafit.methods.lora.attach import Counts, attach, count_parameters, lora_config, resolve_targets
from lorafit.methods.lora.lora import Lora

__all__ = [
    "AdapterSnapshot",
    "Counts",
    "Delta",
    "Deltas",
    "Lora",
    "attach",
    "count_parameters",
    "load_adapter",
    "lora_config",
    "resolve_targets",
    "restore_adapter",
    "save_adapter",
]
