"""Checkpoint: a folder verified by its manifest, and the search for the newest one."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorafit.errors import CheckpointError
from lorafit.runs.own_files import remove_own
from lorafit.runs.seal import file_hash, sealed
from lorafit.runs.writing import follow_umask, sync

MANIFEST, ADAPTER = "manifest.json", "adapter"
SHARDS = "shard-*.safetensors"
"""Files in which several processes keep their parts of one model, as torch names them."""
FORMAT = 1
MAX_MANIFEST_BYTES = 1 << 20
FOREIGN = "it belongs to another run"
_NAME = re.compile(r"step-(\d{6,})")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Hold a checkpoint that verifies.

    Attributes:
        folder: its folder.
        run: the id of its run.
        step: its step.
        eval_loss: the held-out loss at this step, if it was measured.
        is_last: True at the run's last step, when nothing is left to train.
    """

    folder: Path
    run: str
    step: int
    eval_loss: float | None
    is_last: bool = False

    @classmethod
    def open(cls, folder: Path, *, run: str | None = None) -> Checkpoint:
        """Read and hash every file in `folder`.

        `run` is the id of the run that the checkpoint must belong to. Raises CheckpointError with one sentence for the
        first file that is not as written.
        """
        manifest = read_manifest(folder)
        for name, entry in manifest["files"].items():
            _check_file(folder, name, entry)
        present = {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}
        foreign = sorted(present - {*manifest["files"], MANIFEST})
        if foreign:
            raise CheckpointError(f"{foreign[0]} is not in its manifest", where=str(folder))
        if run is not None and manifest["run"] != run:
            raise CheckpointError(FOREIGN, where=str(folder))
        return cls(folder, manifest["run"], manifest["step"], manifest["eval_loss"], manifest["last"])


def seal(folder: Path, *, run: str, step: int, eval_loss: float | None, last: bool = False) -> None:
    """Sync every file in `folder`, write the manifest with their hashes, and sync it."""
    follow_umask(folder)
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        sync(path)
        files[str(path.relative_to(folder))] = {"bytes": path.stat().st_size, "sha256": file_hash(path)}
    for inner in sorted({path.parent for path in folder.rglob("*")}):
        sync(inner)
    manifest = {"format": FORMAT, "run": run, "step": step, "eval_loss": eval_loss, "last": last, "files": files}
    (folder / MANIFEST).write_text(
        _sealed(manifest), encoding="utf-8"
    )  # last, since a folder without manifest is no checkpoint
    sync(folder / MANIFEST)
    sync(folder)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of `folder`, verified by its own hash. Raises CheckpointError."""
    path = folder / MANIFEST
    try:
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            raise CheckpointError("its manifest is far too large", where=str(folder))
        text = path.read_text(encoding="utf-8")
        manifest = json.loads(text)
        del manifest["sha256"]
        # compare the text byte for byte, so that every flipped bit is found
        whole = _sealed(manifest) == text and manifest["format"] == FORMAT
    except FileNotFoundError as error:
        raise CheckpointError("it has no manifest", where=str(folder)) from error
    except OSError as error:
        raise CheckpointError(f"its manifest cannot be read ({error.strerror})", where=str(folder)) from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError("its manifest is damaged", where=str(folder)) from error
    if not whole:
        raise CheckpointError("its manifest is damaged", where=str(folder))
    if folder.name != folder_name(manifest["step"]):
        raise CheckpointError(f"its manifest belongs to step {manifest['step']}", where=str(folder))
    assert isinstance(manifest, dict)
    return manifest


def folder_name(step: int) -> str:
    """Return the folder name of a step, such as step-000120."""
    return f"step-{step:06d}"


def step_of(folder: Path) -> int | None:
    """Return the step in a checkpoint folder's name; None for other names."""
    match = _NAME.fullmatch(folder.name)
    return int(match[1]) if match else None


def checkpoint_folders(folder: Path) -> list[Path]:
    """Return every `step-N` in `folder`, oldest first, verified or not."""
    steps = [(step, path) for path in folder.glob("step-*") if (step := step_of(path)) is not None]
    return [path for _, path in sorted(steps)]


def prune(folder: Path, *, keep_last: int, keep_best: int) -> None:
    """Remove old checkpoints.

    The newest `keep_last` stay, and of the others the `keep_best` with the lowest held-out loss.
    """
    older = checkpoint_folders(folder)[:-keep_last]
    best = {path for _, _, path in _scored(older)[:keep_best]}
    for path in older:
        if path not in best:
            remove_folder(path)


def remove_folder(folder: Path) -> None:
    """Remove a checkpoint.

    A rename comes first, so that a kill never leaves half a checkpoint.
    """
    doomed = folder.with_name(f".{folder.name}.removed")
    remove_own(doomed)
    folder.rename(doomed)
    remove_own(doomed)


def best_step(folder: Path) -> tuple[int, float] | None:
    """Return (step, held-out loss) of the checkpoint in `folder` with the lowest loss, of equal ones the latest.

    Only manifests are read. Returns None if no checkpoint has a loss.
    """
    return next(((-step, loss) for loss, step, _ in _scored(checkpoint_folders(folder))), None)


def _scored(folders: Iterable[Path]) -> list[tuple[float, int, Path]]:
    """Return (held-out loss, -step, folder) of those that have a loss, the best first."""
    return sorted((loss, -(step_of(path) or 0), path) for path in folders if (loss := _loss_of(path)) is not None)


def _loss_of(folder: Path) -> float | None:
    try:
        loss = read_manifest(folder)["eval_loss"]
    except CheckpointError:
        return None
    return float(loss) if loss is not None else None


def _check_file(folder: Path, name: str, entry: Mapping[str, Any]) -> None:
    path = folder / name
    try:
        size = path.stat().st_size
        if size != entry["bytes"]:
            raise CheckpointError(f"{name} has {size:,} of {entry['bytes']:,} bytes", where=str(folder))
        if file_hash(path) != entry["sha256"]:
            raise CheckpointError(f"{name} is not as written (its SHA-256 differs)", where=str(folder))
    except FileNotFoundError as error:
        raise CheckpointError(f"{name} is missing", where=str(folder)) from error
    except OSError as error:
        raise CheckpointError(f"{name} cannot be read ({error.strerror})", where=str(folder)) from error


def _sealed(manifest: Mapping[str, Any]) -> str:
    return json.dumps(sealed(manifest), indent=1) + "\n"


@dataclass(frozen=True, slots=True)
class Damaged:
    """Hold a checkpoint that was skipped.

    Attributes:
        folder: its folder.
        reason: why it does not verify.
        is_foreign: True if it is whole, and of another run.
    """

    folder: Path
    reason: str
    is_foreign: bool = False

    @property
    def step(self) -> int:
        return step_of(self.folder) or 0


def newest_whole(folder: Path, run: str) -> tuple[Checkpoint | None, list[Damaged]]:
    """Return the newest checkpoint of `run` that verifies, and the newer ones that do not."""
    damaged: list[Damaged] = []
    for path in reversed(checkpoint_folders(folder)):
        try:
            return Checkpoint.open(path, run=run), damaged
        except CheckpointError as error:
            damaged.append(Damaged(path, error.what, is_foreign=error.what == FOREIGN))
    return None, damaged


def set_aside(damaged: list[Damaged]) -> None:
    """Rename damaged checkpoints to step-N.damaged (-2, …), so that the run can write new ones.

    Raises OSError if a rename fails.
    """
    for one in damaged:
        one.folder.rename(_free_name(one.folder.with_name(f"{one.folder.name}.damaged")))


def _free_name(path: Path) -> Path:
    """Return `path`, or the first of PATH-2, -3, … that is free: what was set aside earlier stays."""
    names = (path, *(path.with_name(f"{path.name}-{number}") for number in range(2, 1000)))
    return next((name for name in names if not os.path.lexists(name)), path)


def clear_unfinished(folder: Path) -> None:
    """Remove checkpoints that a killed process was writing or removing."""
    for pattern in (".step-*.staged", ".step-*.removed"):
        for path in folder.glob(pattern):
            remove_own(path)
