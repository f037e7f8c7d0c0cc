"""other_folders: what a user names as a base that is none, and what to name in its place."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path

from lorafit.config.foreign_text import read_json
from lorafit.errors import BackboneError

AT_A_FOLDER = "point --base at a folder with a config.json"


def not_a_base(path: Path) -> BackboneError:
    """Return the error of a base without config.json: it says what `path` is, with a fix that works."""
    if not path.is_dir():
        return _no_folder(path)
    for is_one, told in KINDS:
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


KINDS: tuple[tuple[Callable[[Path], bool], Callable[[Path], BackboneError]], ...] = (
    (_has("adapter_config.json"), _adapter),
    (_in_a_run, _run),
    (_has("*.gguf"), _gguf),
    (_has("*.safetensors", "*.bin"), _weights_alone),
)
"""(Whether a folder is of the kind, its error)."""
