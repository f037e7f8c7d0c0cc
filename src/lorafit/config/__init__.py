"""Settings: one frozen `RunConfig`, `resolve`, which says where each value came from, and the run directory."""

from lorafit.config.base_files import base_folder
from lorafit.config.fingerprint import FREE, LAYOUT, RunFingerprint, RunIdentity, differing_settings, held_settings
from lorafit.config.foreign_text import parse_json, read_json
from lorafit.config.resolve import Resolved, Source, load_recipe, parse_assignments, resolve
from lorafit.config.run_config import PLANNED, RunConfig
from lorafit.config.run_dir import RunDir, write_text
from lorafit.config.run_lock import RunLock
from lorafit.config.size import parse_bytes

__all__ = [
    "FREE",
    "LAYOUT",
    "PLANNED",
    "Resolved",
    "RunConfig",
    "RunDir",
    "RunFingerprint",
    "RunIdentity",
    "RunLock",
    "Source",
    "base_folder",
    "differing_settings",
    "held_settings",
    "load_recipe",
    "parse_assignments",
    "parse_bytes",
    "parse_json",
    "read_json",
    "resolve",
    "write_text",
]
