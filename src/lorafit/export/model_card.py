"""model_card: the README.md of an export, which a hub shows."""

from __future__ import annotations

from pathlib import Path

import torch

from lorafit.config import MergeBase, RunConfig
from lorafit.export.formats import ExportFormat
from lorafit.methods import method_of

SHORT_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def model_card(config: RunConfig, onto: MergeBase, form: ExportFormat) -> str:
    """Return the model card of a merged run, with metadata that hubs read."""
    base = Path(config.base).name if Path(config.base).is_dir() else config.base
    method = method_of(config)
    return f"""---
base_model: {base}
library_name: {form.library_name}
pipeline_tag: text-generation
tags: [{method.name}, merged, lorafit]
---
# {base}, fine-tuned and merged

{method.describe(config)} trained over {base},
merged onto the {onto} base and saved in {SHORT_NAMES.get(form.dtype, str(form.dtype))} by lorafit.
`chat_template.jinja` renders the prompt that the model was trained on; generation stops at the ids in
`generation_config.json`. `verification.json`, if present, compares this model with the adapter it was made of.
"""
