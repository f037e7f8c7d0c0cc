"""LoRA adapters: attached, saved, loaded, merged; the only room that imports peft."""

from lorafit.adapters.adapter_folder import AdapterSnapshot, load_adapter, restore_adapter, save_adapter
from lorafit.adapters.attach import Counts, attach, check_settings, count_parameters, lora_config
from lorafit.adapters.deltas import Delta, Deltas, merge_delta
from lorafit.adapters.staged_folder import follow_umask, staged_folder, sync
from lorafit.adapters.targets import resolve_targets

__all__ = [
    "AdapterSnapshot",
    "Counts",
    "Delta",
    "Deltas",
    "attach",
    "check_settings",
    "count_parameters",
    "follow_umask",
    "load_adapter",
    "lora_config",
    "merge_delta",
    "resolve_targets",
    "restore_adapter",
    "save_adapter",
    "staged_folder",
    "sync",
]
