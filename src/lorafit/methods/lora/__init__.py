"""lora: LoRA adapters, attached, saved, loaded and merged. Only this package imports peft."""

from lorafit.methods.lora.adapter_folder import (
    AdapterFiles,
    AdapterSnapshot,
    fitting_weights,
    load_adapter,
    restore_adapter,
    save_adapter,
)
from lorafit.methods.lora.attach import Counts, attach, count_parameters, lora_config, resolve_targets
from lorafit.methods.lora.deltas import Delta, Deltas
from lorafit.methods.lora.expert_adapters import adapts_experts
from lorafit.methods.lora.grouped import GroupedAdapters, plain_adapter
from lorafit.methods.lora.initial.principal import INITIAL_FILE
from lorafit.methods.lora.lora import Lora

__all__ = [
    "INITIAL_FILE",
    "AdapterFiles",
    "AdapterSnapshot",
    "Counts",
    "Delta",
    "Deltas",
    "GroupedAdapters",
    "Lora",
    "adapts_experts",
    "attach",
    "count_parameters",
    "fitting_weights",
    "load_adapter",
    "lora_config",
    "plain_adapter",
    "resolve_targets",
    "restore_adapter",
    "save_adapter",
]
