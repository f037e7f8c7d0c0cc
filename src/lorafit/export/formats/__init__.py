"""formats: export formats, which write merged weights and open them again for verification."""

from lorafit.errors import UsageError
from lorafit.export.formats.export_format import ExportFormat, OpenedModel, Row, TransformersModel, Written
from lorafit.export.formats.safetensors import Safetensors

__all__ = [
    "DEFAULT_FORMAT",
    "FORMATS",
    "ExportFormat",
    "OpenedModel",
    "Row",
    "Safetensors",
    "TransformersModel",
    "Written",
    "format_named",
]

DEFAULT_FORMAT = Safetensors.name
FORMATS: dict[str, ExportFormat] = {DEFAULT_FORMAT: Safetensors()}
"""Every export format by its name."""


def format_named(name: str) -> ExportFormat:
    """Return the export format called `name`. Raises UsageError for an unknown name."""
    if name not in FORMATS:
        fix = f"choose {' or '.join(FORMATS)}"
        raise UsageError(f"'{name:.40}' is not an export format", where="export_format", fix=fix)
    return FORMATS[name]
