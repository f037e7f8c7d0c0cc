"""companions: the files beside merged weights: configuration, generation settings, tokenizer, licence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from lorafit.config import base_folder, read_json
from lorafit.errors import BackboneError
from lorafit.export.finished_run import FinishedRun

# auto_map names Python files of the base, which lorafit neither runs nor copies
DROPPED = ("quantization_config", "torch_dtype", "dtype", "auto_map")
MAX_COMPANION_BYTES = 64 << 20  # a tokenizer lists every added token
LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")


def write_companions(run: FinishedRun, folder: Path, dtype: torch.dtype) -> None:
    """Write configuration, tokenizer and licence to `folder`.

    transformers and vLLM then serve weights of `dtype` from it.
    """
    base = base_folder(run.config.base, run.config.revision)
    _write_json(folder / "config.json", merged_config(_read_json(base / "config.json"), dtype))
    _write_json(folder / "generation_config.json", _generation(base, run.template.stop_ids))
    for path in run.tokenizer.files:
        shutil.copyfile(path, folder / path.name)
    for pattern in LICENCES:
        for path in base.glob(pattern):
            if path.is_file():
                shutil.copyfile(path, folder / path.name)


def merged_config(config: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Return the base's config.json for plain weights of `dtype`, without quantization."""
    merged = {key: value for key, value in config.items() if key not in DROPPED}
    for key, value in merged.items():
        if key.endswith("_config") and isinstance(value, dict):
            merged[key] = merged_config(value, dtype)
    return merged | {"dtype": str(dtype).removeprefix("torch.")}


def set_chat_template(folder: Path, jinja: str) -> None:
    """Make `jinja` the chat template of the tokenizer in `folder`."""
    path = folder / "tokenizer_config.json"
    settings = _read_json(path) if path.is_file() else {"tokenizer_class": "PreTrainedTokenizerFast"}
    # new readers use the file, old ones the setting
    _write_json(path, settings | {"chat_template": jinja})
    (folder / "chat_template.jinja").write_text(jinja, encoding="utf-8")


def _generation(base: Path, stop_ids: Iterable[int]) -> dict[str, Any]:
    path = base / "generation_config.json"
    settings = _read_json(path) if path.is_file() else {}
    return settings | {"eos_token_id": list(stop_ids)}


def _read_json(path: Path) -> dict[str, Any]:
    return read_json(path, BackboneError, max_bytes=MAX_COMPANION_BYTES, fix="repair or remove the file")


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
