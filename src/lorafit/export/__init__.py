"""export: merged weights in a served format, verified against the trained model."""

from lorafit.export.adapter import follow_base, result_hashes, write_adapter_companions
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
    "VERIFICATION_FILE",
    "ExportFormat",
    "MergeReport",
    "OpenedModel",
    "Row",
    "TransformersModel",
    "Verification",
    "Written",
    "follow_base",
    "format_named",
    "merge",
    "result_hashes",
    "verify",
    "write_adapter_companions",
]
