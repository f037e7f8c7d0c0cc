"""Where the files of a base model are: a local folder, or a hub snapshot. No torch, no weights read."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Literal

from lorafit.errors import BackboneError

WEIGHT_PATTERNS = ("*.safetensors", "*.safetensors.index.json")
TEXT_PATTERNS = ("*.json", "*.jinja", "*.model", "*.txt")
MergeBase = Literal["quantized", "original"]
"""Base that a merge starts from: the dequantised 4-bit one that was trained, or the checkpoint as stored."""


def base_folder(base: str, revision: str | None = None, *, weights: bool = False) -> Path:
    """The folder that holds `base`'s configuration and tokenizer, and with `weights` its safetensors too.

    A local path is used as it is. Anything else is a hub id: downloaded, or found in the local hub cache
    when there is no network. Raises BackboneError when neither has it.
    """
    if not base:
        raise BackboneError("no base model was named", fix="pass --base with a local folder or a hub id")
    local = Path(base).expanduser()
    if local.is_dir():
        if not (local / "config.json").is_file():
            raise BackboneError(
                "no config.json in the base's folder", where=str(local), fix="point --base at a model folder"
            )
        return local
    looks_local = base.startswith((".", "/", "~")) or base.count("/") > 1 or base.endswith("/")
    if looks_local or local.exists():
        raise BackboneError("no base model there", where=base, fix="point --base at a folder that holds config.json")
    return _snapshot(base, revision, weights)


def _snapshot(base: str, revision: str | None, weights: bool) -> Path:
    # imported here: it costs a tenth of a second, and a local base never needs it
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    patterns = [*TEXT_PATTERNS, *(WEIGHT_PATTERNS if weights else ())]
    try:
        folder = Path(snapshot_download(base, revision=revision, allow_patterns=patterns))
    except RepositoryNotFoundError as error:
        raise BackboneError(f"the hub has no model '{base}'", fix="check its name, or log in if it is gated") from error
    except HFValidationError as error:
        raise BackboneError(f"'{base}' is neither a folder nor a hub id", fix="check the path") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        if getattr(error, "errno", None) == errno.ENOSPC:
            raise BackboneError(
                f"the disk is full, so '{base}' cannot be downloaded",
                fix="free some space, or set HF_HOME to another disk",
            ) from error
        raise BackboneError(
            f"base '{base}' is not a local folder, and the hub cannot be reached",
            fix="check the name, or download the model once and pass its folder",
        ) from error
    if not (folder / "config.json").is_file():
        raise BackboneError(f"the hub's '{base}' has no config.json", fix="choose a transformers model")
    return folder
