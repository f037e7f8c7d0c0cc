"""model_card: the README.md of an export, which a hub shows."""

from __future__ import annotations

import torch

from lorafit.config import MergeBase, RunConfig
from lorafit.export.formats import ExportFormat
from lorafit.export.lineage import Lineage, base_name
from lorafit.methods import method_of
from lorafit.shapes import published_format

SHORT_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def model_card(
    config: RunConfig,
    onto: MergeBase,
    form: ExportFormat,
    lineage: Lineage | None = None,
    source: RunConfig | None = None,
) -> str:
    """Return the model card of a merged run, with metadata that hubs read.

    `source` has the base that was merged onto, if it is not the run's.
    """
    base, method, is_whole = base_name(config), method_of(config), onto == "whole"
    target = f"the {onto} base"
    if published := published_format(config.base, config.revision):
        target += f" (published in {published}, dequantized)"
    if source is not None and source.base != config.base:
        target = f"{base_name(source)}, a 16-bit model that was not trained over,"
    how = "of" if is_whole else "trained over"
    merged, made_of = ("", "run") if is_whole else (f"merged onto {target} and ", "adapter")
    return f"""---
base_model: {base}
library_name: {form.library_name}
pipeline_tag: text-generation
tags: [{method.name}, merged, lorafit]
---
# {base}, fine-tuned{"" if is_whole else " and merged"}

{method.describe(config)} {how} {base},
{merged}saved in {SHORT_NAMES.get(form.dtype, str(form.dtype))} by lorafit.
`chat_template.jinja` renders the prompt that the model was trained on; generation stops at the ids in
`generation_config.json`. `verification.json`, if present, compares this model with the {made_of} it was made of.
{_origin(lineage)}"""


def whole_card(config: RunConfig, lineage: Lineage) -> str:
    """Return the model card of a full run's own folder, with metadata that hubs read."""
    base, method = base_name(config), method_of(config)
    return f"""---
base_model: {base}
library_name: transformers
pipeline_tag: text-generation
tags: [{method.name}, lorafit]
---
# {base}, fine-tuned

{method.describe(config)} of {base} by lorafit, in the precision in which it trained.
The tokenizer's `chat_template.jinja` renders the prompt of training, and `generation_config.json` has the ids that end
an answer. `lineage.json` has every setting. `lorafit merge` writes these weights in 16 bits, and verifies them.
{_origin(lineage)}"""


def adapter_card(config: RunConfig, lineage: Lineage) -> str:
    """Return the model card of an adapter folder, with metadata that hubs read."""
    base, method = base_name(config), method_of(config)
    over = "4-bit (NF4)" if config.quantization == "nf4" else "16-bit"
    return f"""---
base_model: {base}
library_name: peft
pipeline_tag: text-generation
tags: [{method.name}, adapter, lorafit]
---
# {base}, fine-tuned

{method.describe(config)} trained over the {over} base {base} by lorafit{_dequantized(config)}.
Load it with `PeftModel.from_pretrained(base, folder)`, or serve base and adapter together.
The tokenizer's `chat_template.jinja` renders the prompt of training, and `generation_config.json` has the ids that end
an answer. `lineage.json` has every setting.
{_origin(lineage)}"""


def _dequantized(config: RunConfig) -> str:
    published = published_format(config.base, config.revision)
    return f",\nwhich is published in {published} and was dequantized" if published else ""


def gguf_adapter_card(config: RunConfig, file: str, over: str, lineage: Lineage | None) -> str:
    """Return the model card of an adapter's GGUF `file`, which belongs to the base's file `over`."""
    base, method = base_name(config), method_of(config)
    trained = f"{base} in 4 bits (NF4), which it has dequantized" if config.quantization == "nf4" else base
    return f"""---
base_model: {base}
library_name: gguf
pipeline_tag: text-generation
tags: [{method.name}, adapter, lorafit]
---
# {base}, fine-tuned

{method.describe(config)} by lorafit, as a LoRA file for llama.cpp and Ollama: `{file}`.
It belongs to `{over}`, and to no other file: that is the base of training, {trained}.
`Modelfile` names both for Ollama. `verification.json` has what llama.cpp computes with both.
{_origin(lineage)}"""


def _origin(lineage: Lineage | None) -> str:
    return "" if lineage is None else f"\n{lineage.card()}"
