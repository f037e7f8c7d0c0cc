"""formats: export formats, which write merged weights and open them again for verification."""

from dataclasses import replace
from pathlib import Path

import torch

from lorafit.backbone import stored_dtype
from lorafit.config import MergeBase
from lorafit.errors import UsageError
from lorafit.export.formats.export_format import (
    ExportFormat,
    OpenedModel,
    OwnTokenizer,
    Row,
    TellsTop,
    TransformersModel,
    Written,
)
from lorafit.export.formats.gguf import GGUF_FORMATS, Gguf
from lorafit.export.formats.safetensors import Safetensors
from lorafit.plugins import EXPORT_FORMATS, load_plugin, plugin_names

__all__ = [
    "DEFAULT_FORMAT",
    "FORMATS",
    "ExportFormat",
    "Gguf",
    "OpenedModel",
    "OwnTokenizer",
    "Row",
    "Safetensors",
    "TellsTop",
    "TransformersModel",
    "Written",
    "format_named",
    "in_dtype",
]

DEFAULT_FORMAT = Safetensors.name
FORMATS: dict[str, ExportFormat] = {DEFAULT_FORMAT: Safetensors(), **GGUF_FORMATS}
"""Every built-in export format by its name."""


def format_named(name: str) -> ExportFormat:
    """Return the export format `name`, built in or of an installed package. Raises UsageError for an unknown name."""
    if name in FORMATS:
        return FORMATS[name]
    plugins = plugin_names(EXPORT_FORMATS)
    if name not in plugins:
        *others, last = *FORMATS, *plugins
        fix = f"choose {', '.join(others)} or {last}"
        raise UsageError(f"'{name:.40}' is not an export format", where="export_format", fix=fix)
    form: ExportFormat = load_plugin(EXPORT_FORMATS, name, ExportFormat)()
    return form


DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
"""Precisions of exported weights by their short names."""


def in_dtype(form: ExportFormat, dtype: str, onto: MergeBase, base: Path) -> ExportFormat:
    """Return `form` for weights of `dtype`: bf16, fp16, fp32, or auto.

    With auto, a merge onto the original keeps the dtype of each tensor of `base`, so that untouched tensors keep their
    bits; every other export keeps the dtype of its format. Raises UsageError for a format of one dtype.
    """
    names = ["auto", *DTYPES]
    if dtype not in names:
        raise UsageError(f"'{dtype:.40}' is no dtype of weights", where="dtype", fix=f"choose {' or '.join(names)}")
    if not isinstance(form, Safetensors):
        if dtype != "auto":
            raise UsageError(f"the format {form.name} has its own precision", where="dtype", fix="leave dtype out")
        return form
    if dtype != "auto":
        return replace(form, dtype=DTYPES[dtype])
    return replace(form, dtype=stored_dtype(base), keeps_dtype=True) if onto == "original" else form
