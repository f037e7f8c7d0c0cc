"""Runs: layout, lock, identity, lookup, staged writes and signals of a run directory. No torch."""

from lorafit.runs.identity import FREE, LAYOUT, RunFingerprint, RunIdentity, differing_settings, held_settings
from lorafit.runs.run_dir import RunDir, adapter_hashes, changed_file, file_hash, require_trained_adapter, write_text
from lorafit.runs.writing import RunLock, follow_umask, staged_folder, sync

__all__ = [
    "FREE",
    "LAYOUT",
    "RunDir",
    "RunFingerprint",
    "RunIdentity",
    "RunLock",
    "adapter_hashes",
    "changed_file",
    "differing_settings",
    "file_hash",
    "follow_umask",
    "held_settings",
    "require_trained_adapter",
    "staged_folder",
    "sync",
    "write_text",
]
