"""Settings: one frozen `RunConfig`, `resolve`, which says where each value came from, and the run directory."""

from lorafit.config.base_files import base_folder
from lorafit.config.resolve import Resolved, Source, load_recipe, parse_assignments, resolve
from lorafit.config.run_config import RunConfig
from lorafit.config.run_dir import RunDir, write_text
from lorafit.config.size import parse_bytes

__all__ = [
    "Resolved",
    "RunConfig",
    "RunDir",
    "Source",
    "base_folder",
    "load_recipe",
    "parse_assignments",
    "parse_bytes",
    "resolve",
    "write_text",
]
