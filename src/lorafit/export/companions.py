"""companions: the files beside exported weights: configuration, generation settings, tokenizer, processor, licence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from lorafit.config import base_folder, generation_settings, read_json, served_stop_ids
from lorafit.errors import BackboneError
from lorafit.export.finished_run import FinishedRun

# auto_map names Python files of the base, which lorafit neither runs nor copies
DROPPED = ("quantization_config", "torch_dtype", "dtype", "auto_map")
MAX_COMPANION_BYTES = 64 << 20  # a tokenizer lists every added token
LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
PROCESSORS = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
"""Files beside a multimodal base's tokenizer, from which `AutoProcessor` reads how images become inputs."""
TOKENIZER_CONFIG = "tokenizer_config.json"
FAST = "PreTrainedTokenizerFast"
"""The class of a tokenizer.json, by the name that transformers 4 and 5 both know."""


def write_companions(run: FinishedRun, folder: Path, dtype: torch.dtype) -> None:
    """Write configuration, tokenizer, processor and licence to `folder`.

    transformers and vLLM then serve weights of `dtype` from it.
    """
    config = read_companion(_base_of(run) / "config.json")
    write_companion(folder / "config.json", merged_config(config, dtype))
    _copy(_base_of(run), PROCESSORS, folder)
    write_text_companions(run, folder)


def write_text_companions(run: FinishedRun, folder: Path) -> None:
    """Write tokenizer, generation settings and licence to `folder`, for any export of `run`."""
    base = _base_of(run)
    stops = {"eos_token_id": list(served_stop_ids(run.template.stop_ids, base))}
    write_companion(folder / "generation_config.json", generation_settings(base) | stops)
    for path in run.tokenizer.files:
        shutil.copyfile(path, folder / path.name)
    _copy(base, LICENCES, folder)


def _copy(base: Path, patterns: Iterable[str], folder: Path) -> None:
    for pattern in patterns:
        for path in base.glob(pattern):
            if path.is_file():
                shutil.copyfile(path, folder / path.name)


def merged_config(config: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Return the base's config.json for plain weights of `dtype`, without quantization."""
    merged = {key: value for key, value in config.items() if key not in DROPPED}
    for key, value in merged.items():
        # the keys of a configuration of single layers are their numbers
        if key.endswith("_config") and isinstance(value, dict) and not all(map(str.isdigit, value)):
            merged[key] = merged_config(value, dtype)
    return merged | {"dtype": str(dtype).removeprefix("torch.")}


def set_chat_template(folder: Path, jinja: str) -> None:
    """Make `jinja` the chat template of the tokenizer in `folder`.

    The tokenizer's class gets a name that a folder without config.json and transformers 4 load too.
    """
    path = folder / TOKENIZER_CONFIG
    settings = read_companion(path) if path.is_file() else {"tokenizer_class": FAST}
    is_alone = not (folder / "config.json").is_file()  # whose model type would choose the class
    unnamed = ("TokenizersBackend", None) if is_alone else ("TokenizersBackend",)
    if (folder / "tokenizer.json").is_file() and settings.get("tokenizer_class") in unnamed:
        settings["tokenizer_class"] = FAST
    # new readers use the file, old ones the setting
    write_companion(path, settings | {"chat_template": jinja})
    (folder / "chat_template.jinja").write_text(jinja, encoding="utf-8")


def read_companion(path: Path) -> dict[str, Any]:
    """Return one of the base's JSON files. Raises BackboneError."""
    return read_json(path, BackboneError, max_bytes=MAX_COMPANION_BYTES, fix="repair or remove the file")


def write_companion(path: Path, content: dict[str, Any]) -> None:
    """Write one of an export's JSON files."""
    path.write_text(companion_text(content), encoding="utf-8")


def companion_text(content: dict[str, Any]) -> str:
    """Return the text of one of an export's JSON files."""
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def _base_of(run: FinishedRun) -> Path:
    return base_folder(run.config.base, run.config.revision)
