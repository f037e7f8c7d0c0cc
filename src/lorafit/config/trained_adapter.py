"""Whether the adapter in a run directory is the one that was trained, by the hashes in `fingerprint.json`. No torch."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from lorafit.config.fingerprint import RunIdentity
from lorafit.config.run_dir import RunDir
from lorafit.errors import AdapterError


def adapter_hashes(folder: Path) -> dict[str, str]:
    """File name -> sha256 (hex) of every file in `folder`. OSError when one cannot be read."""
    return {path.name: file_hash(path) for path in sorted(folder.iterdir()) if path.is_file()}


def changed_file(folder: Path, hashes: Mapping[str, str]) -> str | None:
    """The first file of `hashes` that is missing from `folder`, unreadable or another one; None when there is none."""
    for name, digest in hashes.items():
        try:
            if file_hash(folder / name) != digest:
                return name
        except OSError:
            return name
    return None


def require_trained_adapter(run: RunDir) -> None:
    """AdapterError unless the adapter of `run` is the one that was saved; a run that kept no hashes is not checked."""
    if not run.identity.is_file():
        return
    changed = changed_file(run.adapter, RunIdentity.read(run.identity).adapter)
    if changed is not None:
        raise AdapterError(
            f"the adapter is not the one that was trained ({changed} has changed)",
            where=str(run.adapter),
            fix="give the same train command again, which restores it, or train anew with --restart",
        )


def file_hash(path: Path) -> str:
    """Return the sha256 (hex) of the file at `path`."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
