"""load: open a finished run or a merged model to answer."""

from __future__ import annotations

from pathlib import Path

from lorafit.backbone import redirect_library_logs
from lorafit.config import read_json
from lorafit.errors import RunDirError, UsageError
from lorafit.export import DEFAULT_FORMAT, VERIFICATION_FILE
from lorafit.runs import LAST, RunDir
from lorafit.serve import Session


def load(run: str | Path, *, device: str | None = None, checkpoint: str = LAST) -> Session:
    """Load a run or a merged model to answer. `checkpoint` chooses the run's weights: last, best or a step.

    load(run).answer([{"role": "user", "content": "…"}])
    """
    path = Path(run)
    if not path.exists():
        fix = "pass the folder that train or merge made"
        raise RunDirError("no such folder", where=str(path), fix=fix)
    if not RunDir(path).settings.is_file() and (path / "config.json").is_file():
        _require_readable_format(path)
        if checkpoint != LAST:
            raise UsageError("a merged model has no checkpoints", where="checkpoint", fix="name the run instead")
        with redirect_library_logs():
            return Session.load_merged(path, device=device)
    with redirect_library_logs(Path(run) / "log.txt" if Path(run).is_dir() else None, optional=True):
        return Session.load(Path(run), device=device, checkpoint=checkpoint)


def _require_readable_format(folder: Path) -> None:
    """Raise UsageError for a merged model in a format that this process does not serve."""
    proof = folder / VERIFICATION_FILE
    name = read_json(proof, RunDirError).get("export_format") if proof.is_file() else None
    if name not in (None, DEFAULT_FORMAT):  # older releases wrote no name, and had one format
        what = f"the model is in the format '{name!s:.40}', and this command opens {DEFAULT_FORMAT}"
        raise UsageError(what, where=str(folder), fix=f"lorafit serve {folder}, or pass the run")
