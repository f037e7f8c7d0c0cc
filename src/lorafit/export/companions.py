"""The files beside the merged weights: configuration, generation settings, tokenizer, licence, model card."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lorafit.config import MergeBase, RunConfig, base_folder, read_json
from lorafit.errors import BackboneError
from lorafit.export.finished_run import FinishedRun

DTYPE = "bfloat16"
# auto_map names Python files of the base, which lorafit neither runs nor copies
DROPPED = ("quantization_config", "torch_dtype", "dtype", "auto_map")
MAX_COMPANION_BYTES = 64 << 20  # a tokenizer lists every added token
LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")


def write_companions(run: FinishedRun, folder: Path, onto: MergeBase) -> None:
    """Write everything but the weights and the chat template to `folder`, for transformers and vLLM to serve it."""
    base = base_folder(run.config.base, run.config.revision)
    _write_json(folder / "config.json", merged_config(_read_json(base / "config.json")))
    _write_json(folder / "generation_config.json", _generation(base, run.template.stop_ids))
    for path in run.tokenizer.files:
        shutil.copyfile(path, folder / path.name)
    for pattern in LICENCES:
        for path in base.glob(pattern):
            if path.is_file():
                shutil.copyfile(path, folder / path.name)
    (folder / "README.md").write_text(_card(run.config, onto), encoding="utf-8")


def merged_config(config: dict[str, Any]) -> dict[str, Any]:
    """The base's config.json for 16-bit weights: no quantisation, every dtype bf16, nothing else changed."""
    merged = {key: value for key, value in config.items() if key not in DROPPED}
    for key, value in merged.items():
        if key.endswith("_config") and isinstance(value, dict):
            merged[key] = merged_config(value)
    return merged | {"dtype": DTYPE}


def set_chat_template(folder: Path, jinja: str) -> None:
    """Make `jinja` the chat template of the tokenizer in `folder`."""
    path = folder / "tokenizer_config.json"
    settings = _read_json(path) if path.is_file() else {"tokenizer_class": "PreTrainedTokenizerFast"}
    # new readers take the file, old ones the setting: both, and the same
    _write_json(path, settings | {"chat_template": jinja})
    (folder / "chat_template.jinja").write_text(jinja, encoding="utf-8")


def _generation(base: Path, stop_ids: Iterable[int]) -> dict[str, Any]:
    path = base / "generation_config.json"
    settings = _read_json(path) if path.is_file() else {}
    return settings | {"eos_token_id": list(stop_ids)}


def _card(config: RunConfig, onto: MergeBase) -> str:
    base = Path(config.base).name if Path(config.base).is_dir() else config.base
    return f"""---
base_model: {base}
library_name: transformers
pipeline_tag: text-generation
tags: [lora, merged, lorafit]
---
# {base}, fine-tuned and merged

LoRA (rank {config.rank}, alpha {config.alpha:g}) trained over {base},
merged onto the {onto} base and saved in bf16 by lorafit.
`chat_template.jinja` renders the prompt that the model was trained on; generation stops at the ids in
`generation_config.json`. `verification.json`, if present, compares this model with the adapter it was made of.
"""


def _read_json(path: Path) -> dict[str, Any]:
    return read_json(path, BackboneError, max_bytes=MAX_COMPANION_BYTES, fix="mend or remove it")


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
