"""export: merged weights in a served format, verified against the trained model."""

from lorafit.export.formats import (
    DEFAULT_FORMAT,
    FORMATS,
    ExportFormat,
    OpenedModel,
    Row,
    TransformersModel,
    Written,
    format_named,
)
from lorafit.export.merge import MergeReport, merge
from lorafit.export.verify import VERIFICATION_FILE, Verification, verify

__all__ = [
    "DEFAULT_FORMAT",
    "FORMATS",
    "ExportFormat",
    "MergeReport",
    "OpenedModel",
    "Row",
    "TransformersModel",
    "VERIFICATION_FILE",
    "Verification",
    "Written",
    "format_named",
    "merge",
    "verify",
]
