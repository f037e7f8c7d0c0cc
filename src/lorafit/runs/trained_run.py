"""trained_run: the weights of a finished run, proved to be the trained ones before another command relies on them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorafit.config.foreign_text import read_json
from lorafit.errors import AdapterError, CheckpointError, RunDirError, UsageError
from lorafit.runs.checkpoint import (
    ADAPTER,
    SHARDS,
    Checkpoint,
    best_step,
    checkpoint_folders,
    folder_name,
    read_manifest,
    step_of,
)
from lorafit.runs.identity import RunIdentity, differing_settings, held_settings, with_defaults
from lorafit.runs.run_dir import RunDir
from lorafit.runs.seal import changed_file, file_hash, why_unreadable

REPEAT = "repeat the train command, which restores it, or pass --restart to train again"
DOCUMENTS = (".md",)
"""Endings of files for people. They may be edited, and no command reads them."""


LAST, BEST = "last", "best"
"""Names of the weights at the end of training, and of those with the lowest held-out loss."""


@dataclass(frozen=True)
class ChosenWeights:
    """Hold the weights of a run that a command uses.

    Attributes:
        folder: their folder.
        step: their optimizer step; None for the weights at the end of training.
        eval_loss: the held-out loss of an earlier step, if it was measured.
    """

    folder: Path
    step: int | None = None
    eval_loss: float | None = None

    @property
    def suffix(self) -> str:
        """Return the end of an export's name: nothing for the weights at the end of training."""
        return "" if self.step is None else f"-{folder_name(self.step)}"


def choose_weights(run: RunDir, checkpoint: str = LAST) -> ChosenWeights:
    """Return the weights of `run` that `checkpoint` names: last, best, or a step that has a checkpoint.

    Every file that is read of the run has proved to be the trained one. Raises RunDirError or AdapterError as
    `require_trained_run` does, UsageError for a checkpoint that is not kept, CheckpointError for a damaged one.
    """
    identity = require_trained_run(run)
    if checkpoint == LAST:
        return ChosenWeights(run.adapter)
    kept = [step_of(path) for path in checkpoint_folders(run.checkpoints)]
    fix = f"choose {LAST}, {BEST} or {' or '.join(map(str, kept))}" if kept else f"choose {LAST}"
    step = _best_step(run, fix) if checkpoint == BEST else _step_named(checkpoint)
    if step is None or step not in kept:
        what = f"'{checkpoint:.40}' is no checkpoint of this run"
        raise UsageError(what, where=str(run.path), fix=fix)
    try:
        whole = Checkpoint.open(run.checkpoints / folder_name(step), run=identity.run)
    except CheckpointError as error:
        raise CheckpointError(error.what, where=error.where, fix="choose another checkpoint, or last") from error
    if whole.is_last:
        return ChosenWeights(run.adapter)
    if next((whole.folder / ADAPTER).glob(SHARDS), None) is not None:
        what = f"checkpoint {step} holds the shards of several GPUs, and no whole model"
        raise UsageError(what, where=str(whole.folder), fix=f"choose {LAST}")
    return ChosenWeights(whole.folder / ADAPTER, whole.step, whole.eval_loss)


def _best_step(run: RunDir, fix: str) -> int:
    for folder in checkpoint_folders(run.checkpoints):
        read_manifest(folder)  # the loss of a damaged checkpoint is unknown, and might be the lowest
    best = best_step(run.checkpoints)
    if best is None:
        what = "no checkpoint of this run has a held-out loss, so none is known to be the best"
        raise UsageError(what, where=str(run.path), fix=fix.replace(f", {BEST}", ""))
    return best[0]


def _step_named(checkpoint: str) -> int | None:
    digits = checkpoint.removeprefix("step-")
    return int(digits) if digits.isascii() and digits.isdigit() and len(digits) < 16 else None


def adapter_hashes(folder: Path) -> dict[str, str]:
    """Return file name -> sha256 (hex) of every file in `folder` but DOCUMENTS. Raises OSError."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.suffix not in DOCUMENTS)
    return {path.name: file_hash(path) for path in files}


def require_trained_run(run: RunDir) -> RunIdentity:
    """Return the identity of `run`, once every file that is read of it has proved to be the trained one.

    Raises AdapterError for another adapter. Raises RunDirError for a damaged identity, for settings that are not the
    trained ones, and for another template or other held-out rows.
    """
    identity = RunIdentity.read(run.identity)
    changed = changed_file(run.adapter, identity.adapter)
    if changed is not None:
        _require_readable(run.adapter / changed)
        what = f"the adapter has changed since training ({changed} differs)"
        raise AdapterError(what, where=str(run.adapter), fix=REPEAT)
    if not identity.adapter:
        what = "fingerprint.json has no hashes of the adapter, so nothing proves that it is the trained one"
        raise AdapterError(what, where=str(run.path), fix="repeat the train command, which compares and seals it")
    changed = changed_file(run.path, identity.files) or _other_template(run, identity)
    if changed is not None:
        _require_readable(run.path / changed)
        raise RunDirError("the file has changed since training", where=str(run.path / changed), fix=REPEAT)
    _require_trained_settings(run, identity)
    return identity


def _require_readable(path: Path) -> None:
    """Raise RunDirError if the file is there and cannot be read, which is no change of it."""
    if (reason := why_unreadable(path)) is not None:
        what = f"the file cannot be read ({reason})"
        raise RunDirError(what, where=str(path), fix="check its permissions and the disk")


def _other_template(run: RunDir, identity: RunIdentity) -> str | None:
    """Return the template's file name if its text is not the trained one: the only proof in an older release's run."""
    jinja: Any = read_json(run.template, RunDirError, fix=REPEAT, max_bytes=64 << 20).get("jinja")
    digest = hashlib.sha256(jinja.encode("utf-8", "surrogatepass")).hexdigest() if isinstance(jinja, str) else ""
    return None if digest == identity.fingerprint.template else run.template.name


def _require_trained_settings(run: RunDir, identity: RunIdentity) -> None:
    then, now = identity.fingerprint.settings, held_settings(run.config())
    for name, trained, found in differing_settings(with_defaults(then, now), now):
        raise RunDirError(
            f"the file says {name} = {found:.80}, but the run was trained with {trained:.80}",
            where=str(run.settings),
            fix=f"write {name} back",
        )
