"""Base files: the local folder or hub snapshot of a base model, and errors for folders that are none. No torch."""

from __future__ import annotations

import errno
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from lorafit.config.foreign_text import read_json
from lorafit.errors import BackboneError

WEIGHT_PATTERNS = ("*.safetensors", "*.safetensors.index.json")
TEXT_PATTERNS = ("*.json", "*.jinja", "*.model", "*.txt")
MergeBase = Literal["quantized", "original", "whole"]
"""Base that a merge starts from. It is the dequantized 4-bit base of training, or the checkpoint as stored.

`whole` is no base: a full run has trained every weight.
"""
MERGE_BASES = ("quantized", "original")
"""Bases that a user can name."""
AT_A_FOLDER = "point --base at a folder with a config.json"


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
            raise _not_a_base(local)
        return local
    looks_local = base.startswith((".", "/", "~")) or base.count("/") > 1 or base.endswith("/")
    if looks_local or local.exists():
        raise _not_a_base(local)
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


def _not_a_base(path: Path) -> BackboneError:
    """Return the error of a base without config.json: it says what `path` is, with a fix that works."""
    if not path.is_dir():
        return _no_folder(path)
    for is_one, told in _OTHER_KINDS:
        if is_one(path):
            return told(path)
    what = "no config.json in the base's folder"
    return BackboneError(what, where=str(path), fix="point --base at a model folder")


def _no_folder(path: Path) -> BackboneError:
    if path.suffix.lower() == ".gguf":
        return _gguf(path)
    if path.is_file() and (path.parent / "config.json").is_file():
        fix = f"pass its folder: --base {shlex.quote(str(path.parent))}"
        return BackboneError("the base is one file, and a base is a folder", where=str(path), fix=fix)
    return BackboneError("the base is not a folder", where=str(path), fix=AT_A_FOLDER)


def _gguf(path: Path) -> BackboneError:
    fix = "pass the safetensors model that it was made from, as a folder or a hub id"
    return BackboneError("the base is a GGUF file, and those are not trained", where=str(path), fix=fix)


def _adapter(folder: Path) -> BackboneError:
    named = read_json(folder / "adapter_config.json", BackboneError).get("base_model_name_or_path")
    base = shlex.quote(named) if isinstance(named, str) and named else "ITS_BASE"
    fix = f"to train it further, pass --base {base} --set init_adapter={shlex.quote(str(folder))}"
    return BackboneError("this folder is an adapter, not a base", where=str(folder), fix=fix)


def _run(folder: Path) -> BackboneError:
    """Return the error of a run's folder, or of a folder within one."""
    run = next(each for each in _around(folder) if (each / "run.yaml").is_file())
    if not (run / "fingerprint.json").is_file() or not (run / "adapter").is_dir():
        fix = "point --base at a model folder"
    else:
        fix = f"merge it first with 'lorafit merge {shlex.quote(str(run))}', and pass the folder that it names"
    return BackboneError("this folder is a run of lorafit, not a base", where=str(folder), fix=fix)


def _weights_alone(folder: Path) -> BackboneError:
    fix = "copy config.json and the tokenizer's files of the model beside them"
    return BackboneError("the base's folder has weights but no config.json", where=str(folder), fix=fix)


def _has(*patterns: str) -> Callable[[Path], bool]:
    return lambda folder: any(next(folder.glob(pattern), None) is not None for pattern in patterns)


def _in_a_run(folder: Path) -> bool:
    return any((each / "run.yaml").is_file() for each in _around(folder))


def _around(folder: Path) -> tuple[Path, ...]:
    """Return `folder` and the two folders around it: a checkpoint lies in a run's `checkpoints`."""
    return (folder, *folder.absolute().parents[:2])


_OTHER_KINDS: tuple[tuple[Callable[[Path], bool], Callable[[Path], BackboneError]], ...] = (
    (_has("adapter_config.json"), _adapter),
    (_in_a_run, _run),
    (_has("*.gguf"), _gguf),
    (_has("*.safetensors", "*.bin"), _weights_alone),
)
"""(Whether a folder is of the kind, its error)."""
