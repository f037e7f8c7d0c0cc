"""Settings: the frozen `RunConfig`, and `resolve`, which records the source of each value."""

from lorafit.config.base_files import MERGE_BASES, MergeBase, base_folder
from lorafit.config.foreign_text import one_line, parse_bytes, read_json
from lorafit.config.generation import generation_settings, sampling_settings, served_stop_ids
from lorafit.config.new_files import NewFiles
from lorafit.config.resolve import Resolved, Source, load_recipe, parse_assignments, reject_unknown, resolve
from lorafit.config.run_config import EMBEDDING, HEAD, MAX_RANK, MAX_SCALE, PLANNED, RunConfig

__all__ = [
    "EMBEDDING",
    "HEAD",
    "MAX_RANK",
    "MAX_SCALE",
    "MERGE_BASES",
    "PLANNED",
    "MergeBase",
    "NewFiles",
    "Resolved",
    "RunConfig",
    "Source",
    "base_folder",
    "generation_settings",
    "load_recipe",
    "one_line",
    "parse_assignments",
    "parse_bytes",
    "read_json",
    "reject_unknown",
    "resolve",
    "sampling_settings",
    "served_stop_ids",
]
