"""seal: JSON that carries its own SHA-256, so that every changed character is found.

The hash has no key. It shows damage and edits, and is no signature of whoever wrote the file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

DIGEST = "sha256"


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return `content` with its hash as a last entry. Keys are strings, values JSON values."""
    return {**content, DIGEST: _digest(content)}


def is_sealed(content: Mapping[str, Any]) -> bool:
    """Return True if `content` is as `sealed` returned it."""
    return content.get(DIGEST) == _digest({key: value for key, value in content.items() if key != DIGEST})


def file_hash(path: Path) -> str:
    """Return the sha256 (hex) of the file at `path`. Raises OSError."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def file_hashes(paths: Iterable[Path]) -> dict[str, str]:
    """Return file name -> sha256 (hex) of the files at `paths`. Raises OSError."""
    return {path.name: file_hash(path) for path in paths}


def changed_file(folder: Path, hashes: Mapping[str, str]) -> str | None:
    """Return the first file of `hashes` in `folder` that is missing, unreadable or changed, or None."""
    for name, digest in hashes.items():
        try:
            if file_hash(folder / name) != digest:
                return name
        except (OSError, ValueError):
            return name
    return None


def why_unreadable(path: Path) -> str | None:
    """Return the system's words if the file at `path` is there and cannot be read, or None."""
    try:
        file_hash(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        return error.strerror or str(error)
    return None


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
