"""Base files: the local folder or hub snapshot of a base model. No torch, no weights read."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Literal

from lorafit.config.other_folders import not_a_base
from lorafit.errors import BackboneError

WEIGHT_PATTERNS = ("*.safetensors", "*.safetensors.index.json")
TEXT_PATTERNS = ("*.json", "*.jinja", "*.model", "*.txt")
MergeBase = Literal["quantized", "original", "whole"]
"""Base that a merge starts from. It is the dequantized 4-bit base of training, or the checkpoint as stored.

`whole` is no base: a full run has trained every weight.
"""
MERGE_BASES = ("quantized", "original")
"""Bases that a user can name."""


def base_folder(base: str, revision: str | None = None, *, weights: bool = False) -> Path:
    """Return the folder with `base`'s configuration, tokenizer and, with `weights`, safetensors.

    A local path is used as it is. Any other name is a hub id, which is downloaded, or found in the local hub cache
    without a network. Raises BackboneError when neither has the base.
    """
    if not base:
        raise BackboneError("no base model was named", fix="pass --base with a local folder or a hub id")
    local = Path(base).expanduser()
    if local.is_dir():
        if not (local / "config.json").is_file():
            raise not_a_base(local)
        return local
    looks_local = base.startswith((".", "/", "~")) or base.count("/") > 1 or base.endswith("/")
    if looks_local or local.exists():
        raise not_a_base(local)
    return _snapshot(base, revision, weights)


def _snapshot(base: str, revision: str | None, weights: bool) -> Path:
    # imported here because it takes a tenth of a second, and a local base does not need it
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
