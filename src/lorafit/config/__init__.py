"""Settings: one frozen `RunConfig`, and `resolve`, which says where each value came from."""

from lorafit.config.base_files import base_folder
from lorafit.config.resolve import Resolved, Source, load_recipe, parse_assignments, resolve
from lorafit.config.run_config import RunConfig
from lorafit.config.size import parse_bytes

__all__ = [
    "Resolved",
    "RunConfig",
    "Source",
    "base_folder",
    "load_recipe",
    "parse_assignments",
    "parse_bytes",
    "resolve",
]
