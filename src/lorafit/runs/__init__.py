"""Runs: layout, lock, identity, seal, lookup, own files and signals of a run directory. No torch."""

from lorafit.runs.checkpoint import ADAPTER, SHARDS, Checkpoint, best_step, clear_unfinished, newest_whole, set_aside
from lorafit.runs.identity import FREE, LAYOUT, RunFingerprint, RunIdentity, differing_settings, held_settings
from lorafit.runs.initial_adapter import InitialAdapter, with_initial_adapter
from lorafit.runs.own_files import (
    append_own,
    new_own,
    new_own_folder,
    open_own,
    read_own,
    refuse_planted,
    remove_own,
    require_folder,
)
from lorafit.runs.run_dir import RunDir, write_text
from lorafit.runs.seal import changed_file, file_hash, is_sealed, sealed
from lorafit.runs.trained_run import LAST, ChosenWeights, adapter_hashes, choose_weights, require_trained_run
from lorafit.runs.writing import RunLock, staged_folder, sync

__all__ = [
    "ADAPTER",
    "FREE",
    "LAST",
    "LAYOUT",
    "SHARDS",
    "Checkpoint",
    "ChosenWeights",
    "InitialAdapter",
    "RunDir",
    "RunFingerprint",
    "RunIdentity",
    "RunLock",
    "adapter_hashes",
    "append_own",
    "best_step",
    "changed_file",
    "choose_weights",
    "clear_unfinished",
    "differing_settings",
    "file_hash",
    "held_settings",
    "is_sealed",
    "new_own",
    "new_own_folder",
    "newest_whole",
    "open_own",
    "read_own",
    "refuse_planted",
    "remove_own",
    "require_folder",
    "require_trained_run",
    "sealed",
    "set_aside",
    "staged_folder",
    "sync",
    "with_initial_adapter",
    "write_text",
]
