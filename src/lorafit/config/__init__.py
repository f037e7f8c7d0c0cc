"""Settings: one frozen `RunConfig`, `resolve`, which says where each value came from, and the run directory."""

from lorafit.config.base_files import MergeBase, base_folder
from lorafit.config.fingerprint import FREE, LAYOUT, RunFingerprint, RunIdentity, differing_settings, held_settings
from lorafit.config.foreign_text import parse_json, read_json
from lorafit.config.resolve import Resolved, Source, load_recipe, parse_assignments, reject_unknown, resolve
from lorafit.config.run_config import MAX_SCALE, PLANNED, RunConfig
from lorafit.config.run_dir import RunDir, write_text
from lorafit.config.run_lock import RunLock
from lorafit.config.size import parse_bytes
from lorafit.config.staged_folder import follow_umask, staged_folder, sync
from lorafit.config.trained_adapter import adapter_hashes, changed_file, file_hash, require_trained_adapter

__all__ = [
    "FREE",
    "LAYOUT",
    "MAX_SCALE",
    "MergeBase",
    "PLANNED",
    "Resolved",
    "RunConfig",
    "RunDir",
    "RunFingerprint",
    "RunIdentity",
    "RunLock",
    "Source",
    "adapter_hashes",
    "base_folder",
    "changed_file",
    "differing_settings",
    "file_hash",
    "follow_umask",
    "held_settings",
    "load_recipe",
    "parse_assignments",
    "parse_bytes",
    "parse_json",
    "read_json",
    "reject_unknown",
    "require_trained_adapter",
    "resolve",
    "staged_folder",
    "sync",
    "write_text",
]
