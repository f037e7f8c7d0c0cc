"""Skeleton: the sizes of families outside the table, counted by transformers.

A child process builds the model without weights, so that planning itself imports no torch. The user's cache keeps the
sizes by the content of config.json and the version of transformers. Each file carries a checksum, and a damaged file
counts as absent.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lorafit
from lorafit.errors import BackboneError

CHILD = "lorafit.backbone.skeleton.sizes"
TIMEOUT_S = 300
FORMAT = 10
"""Version of the cached sizes. Raise it when the same config.json leads to other sizes."""


def skeleton_sizes(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return the sizes of transformers' own model for a config.json.

    Raises BackboneError when transformers cannot build the model, for example for an unknown type.
    """
    text = json.dumps({key: value for key, value in config.items() if key != "quantization_config"}, sort_keys=True)
    version = importlib.metadata.version("transformers")
    path = _cache_folder() / f"{hashlib.sha256(f'{FORMAT} {version} {text}'.encode()).hexdigest()}.json"
    sizes = _read_cache(path)
    if sizes is None:
        sizes = _run_child(text, name)
        _write_cache(path, sizes)
    return sizes


def _run_child(text: str, name: str) -> dict[str, Any]:
    root = str(Path(lorafit.__file__).parents[1])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    quiet = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path}
    with tempfile.TemporaryDirectory(prefix="lorafit-skeleton-") as folder:
        Path(folder, "config.json").write_text(text, encoding="utf-8")
        command = [sys.executable, "-P", "-m", CHILD, folder]
        try:
            child = subprocess.run(
                command,
                env={**os.environ, **quiet},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=TIMEOUT_S,
            )
        except subprocess.TimeoutExpired as error:
            message = f"transformers did not build the model in {TIMEOUT_S} s"
            raise BackboneError(message, where=name, fix="check config.json") from error
    return _parse_sizes(child, name)


def _parse_sizes(child: subprocess.CompletedProcess[str], name: str) -> dict[str, Any]:
    try:
        sizes = json.loads(child.stdout)
    except ValueError:
        reason = (child.stderr.strip().splitlines() or ["no reason given"])[-1][:300]
        message = f"transformers cannot build the model ({reason})"
        raise BackboneError(message, where=name, fix="check config.json") from None
    if "error" in sizes:
        raise BackboneError(sizes["error"], where=name, fix=sizes["fix"])
    return dict(sizes)


def _read_cache(path: Path) -> dict[str, Any] | None:
    """Return the sizes in the file at `path`; None for a missing or damaged file."""
    try:
        cached = json.loads(path.read_text(encoding="utf-8"))
        is_whole = cached["sha256"] == _checksum(cached["sizes"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return dict(cached["sizes"]) if is_whole else None


def _write_cache(path: Path, sizes: dict[str, Any]) -> None:
    """Write the sizes atomically. Without a writable folder every call runs the child again."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.partial")
        partial.write_text(json.dumps({"sha256": _checksum(sizes), "sizes": sizes}), encoding="utf-8")
        partial.replace(path)
    except OSError:
        return


def _checksum(sizes: Any) -> str:
    return hashlib.sha256(json.dumps(sizes, sort_keys=True).encode()).hexdigest()


def _cache_folder() -> Path:
    """Return the folder of cached sizes: `$LORAFIT_CACHE`, or `lorafit` in the user's cache folder."""
    named, home = os.environ.get("LORAFIT_CACHE"), os.environ.get("XDG_CACHE_HOME")
    return (Path(named) if named else (Path(home) if home else Path.home() / ".cache") / "lorafit") / "shapes"
