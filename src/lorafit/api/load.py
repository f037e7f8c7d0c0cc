"""load: a finished run or a merged model, ready to answer."""

from __future__ import annotations

from pathlib import Path

from lorafit.backbone import redirect_library_logs
from lorafit.errors import RunDirError
from lorafit.runs import RunDir
from lorafit.serve import Session


def load(run: str | Path, *, device: str | None = None) -> Session:
    """Load a run, or a merged model, to answer: `load(run).answer([{"role": "user", "content": "…"}])`."""
    path = Path(run)
    if not path.exists():
        fix = "check the path; pass the folder that train or merge made"
        raise RunDirError("no such folder", where=str(path), fix=fix)
    if not RunDir(path).settings.is_file() and (path / "config.json").is_file():
        with redirect_library_logs():
            return Session.load_merged(path, device=device)
    with redirect_library_logs(Path(run) / "log.txt" if Path(run).is_dir() else None, optional=True):
        return Session.load(Path(run), device=device)
