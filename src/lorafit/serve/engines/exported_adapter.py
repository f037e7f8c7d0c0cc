"""exported_adapter: an adapter of `lorafit export --to adapter`, checked before another program loads it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lorafit.config import read_json
from lorafit.errors import AdapterError, UsageError, VerificationError
from lorafit.serve.adapters.source import allowed_path

UNTRUSTED = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt", "*.py")
TEMPLATE = "chat_template.jinja"


def require_adapter(path: Path, roots: Sequence[Path], most_rank: int, template: Path | None) -> Path:
    """Return the adapter's folder without links.

    Raises UsageError for a place that no root holds or a rank above `most_rank`, AdapterError for files that must not
    be trusted, and VerificationError for an adapter that failed its proof or has another chat template.
    """
    folder = allowed_path(path, roots)
    for each in sorted(folder.iterdir() if folder.is_dir() else ()):
        allowed_path(each, roots)  # a link in the folder may lead out of it
    if not (folder / "adapter_config.json").is_file() or not (folder / "adapter_model.safetensors").is_file():
        what = "the folder holds no exported adapter"
        raise UsageError(what, where=str(path), fix="export the run with --to adapter, and name adapters/NAME")
    if other := next((each for pattern in UNTRUSTED for each in folder.glob(pattern)), None):
        raise AdapterError("only safetensors are loaded", where=str(other), fix="remove the file")
    rank = read_json(folder / "adapter_config.json", AdapterError).get("r")
    if not isinstance(rank, int) or not 0 < rank <= most_rank:
        what = f"the adapter has rank {rank}, and the server takes ranks up to {most_rank}"
        raise UsageError(what, where=str(path), fix="start the server with this adapter in its folder")
    if template is not None and _text(folder / TEMPLATE) != _text(template):
        what = "the adapter was trained with another chat template than the one that is served"
        raise VerificationError(what, where=str(path), fix="serve it from a server of its own")
    require_proof(folder)
    return folder


def require_proof(folder: Path) -> None:
    """Raise VerificationError if the exported adapter in `folder` failed its proof, or has none."""
    verified = folder / "verification.json"
    engines = read_json(verified, AdapterError).get("engines", []) if verified.is_file() else []
    if not engines or any(engine.get("status") == "failed" for engine in engines):
        raise VerificationError("the adapter's export is not proved", where=str(folder), fix="export the run again")


def _text(path: Path) -> str | None:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None
