"""load: a finished run, ready to answer."""

from __future__ import annotations

from pathlib import Path

from lorafit.backbone import redirect_library_logs
from lorafit.serve import Session


def load(run: str | Path, *, device: str | None = None) -> Session:
    """The run in folder `run` as a Session: `load(run).answer([{"role": "user", "content": "…"}])`."""
    with redirect_library_logs(Path(run) / "log.txt" if Path(run).is_dir() else None, optional=True):
        return Session.load(Path(run), device=device)
