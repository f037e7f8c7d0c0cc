"""Runs: layout, lock, identity, seal, lookup, own files and signals of a run directory. No torch."""

from lorafit.runs.identity import FREE, LAYOUT, RunFingerprint, RunIdentity, differing_settings, held_settings
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
from lorafit.runs.trained_run import adapter_hashes, require_trained_run
from lorafit.runs.writing import RunLock, follow_umask, staged_folder, sync

__all__ = [
    "FREE",
    "LAYOUT",
    "RunDir",
    "RunFingerprint",
    "RunIdentity",
    "RunLock",
    "adapter_hashes",
    "append_own",
    "changed_file",
    "differing_settings",
    "file_hash",
    "follow_umask",
    "held_settings",
    "is_sealed",
    "new_own",
    "new_own_folder",
    "open_own",
    "read_own",
    "refuse_planted",
    "remove_own",
    "require_folder",
    "require_trained_run",
    "sealed",
    "staged_folder",
    "sync",
    "write_text",
]
