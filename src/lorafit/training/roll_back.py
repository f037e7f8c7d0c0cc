"""RollBack: back to the last good checkpoint, out of transformers' loop, which only knows forwards."""

from __future__ import annotations

from pathlib import Path

from lorafit.errors import CheckpointError
from lorafit.training.checkpoint import Checkpoint, checkpoint_folders


class RollBack(Exception):
    """Raised inside the loop; the trainer catches it and begins again from `folder`. Never reaches a user."""

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder))
        self.folder = folder


def newest_good(folder: Path, run: str) -> Path | None:
    """The newest checkpoint in `folder` that verifies and belongs to `run`."""
    for path in reversed(checkpoint_folders(folder)):
        try:
            Checkpoint.open(path, run=run)
        except CheckpointError:
            continue
        return path
    return None
