"""Where a run goes on: the newest checkpoint that verifies, past any that do not."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from lorafit.errors import CheckpointError
from lorafit.training.checkpoints.folder import Checkpoint, checkpoint_folders, step_of


@dataclass(frozen=True, slots=True)
class Damaged:
    """A checkpoint that was passed over, and why."""

    folder: Path
    reason: str

    @property
    def step(self) -> int:
        return step_of(self.folder) or 0


def newest_whole(folder: Path, run: str) -> tuple[Checkpoint | None, list[Damaged]]:
    """The newest checkpoint of `run` in `folder` that verifies, and the newer ones that do not."""
    damaged: list[Damaged] = []
    for path in reversed(checkpoint_folders(folder)):
        try:
            return Checkpoint.open(path, run=run), damaged
        except CheckpointError as error:
            damaged.append(Damaged(path, error.what))
    return None, damaged


def set_aside(damaged: list[Damaged]) -> None:
    """Rename damaged checkpoints to step-N.damaged, so that the run writes its own there. OSError when it cannot."""
    for one in damaged:
        aside = one.folder.with_name(f"{one.folder.name}.damaged")
        shutil.rmtree(aside, ignore_errors=True)
        one.folder.rename(aside)


def clear_unfinished(folder: Path) -> None:
    """Remove what a killed process was writing or removing: nothing of it was a checkpoint."""
    for pattern in (".step-*.staged", ".step-*.removed"):
        for path in folder.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)
