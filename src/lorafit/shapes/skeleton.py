"""Sizes of families that the table lacks, asked of transformers in a child process and kept on disk.

The child builds the model without weights, so that planning itself imports no torch. An answer is kept under the user's
cache by the content of config.json and transformers' version; its file carries a checksum, and a damaged one counts as
absent.
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

CHILD = "lorafit.backbone.skeleton_sizes"
TIMEOUT_S = 300
FORMAT = 1
"""Raise it when the same config.json leads to other sizes than before."""


def skeleton_sizes(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return the sizes of transformers' own model for a config.json.

    Raises BackboneError when transformers cannot build it, such as for a type that it does not know.
    """
    text = json.dumps({key: value for key, value in config.items() if key != "quantization_config"}, sort_keys=True)
    version = importlib.metadata.version("transformers")
    place = _cache_folder() / f"{hashlib.sha256(f'{FORMAT} {version} {text}'.encode()).hexdigest()}.json"
    found = _kept(place)
    if found is None:
        found = _asked(text, name)
        _keep(place, found)
    return found


def _asked(text: str, name: str) -> dict[str, Any]:
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
    return _answer(child, name)


def _answer(child: subprocess.CompletedProcess[str], name: str) -> dict[str, Any]:
    try:
        found = json.loads(child.stdout)
    except ValueError:
        reason = (child.stderr.strip().splitlines() or ["no reason given"])[-1][:300]
        message = f"transformers cannot build the model ({reason})"
        raise BackboneError(message, where=name, fix="check config.json") from None
    if "error" in found:
        raise BackboneError(found["error"], where=name, fix=found["fix"])
    return dict(found)


def _kept(place: Path) -> dict[str, Any] | None:
    """Return the answer in `place`; None when there is none, or a damaged one."""
    try:
        kept = json.loads(place.read_text(encoding="utf-8"))
        whole = kept["sha256"] == _checksum(kept["sizes"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return dict(kept["sizes"]) if whole else None


def _keep(place: Path, sizes: dict[str, Any]) -> None:
    """Write the answer at once or not at all. A folder that cannot be written costs a child each time, no more."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        partial = place.with_suffix(f".{os.getpid()}.partial")
        partial.write_text(json.dumps({"sha256": _checksum(sizes), "sizes": sizes}), encoding="utf-8")
        partial.replace(place)
    except OSError:
        return


def _checksum(sizes: Any) -> str:
    return hashlib.sha256(json.dumps(sizes, sort_keys=True).encode()).hexdigest()


def _cache_folder() -> Path:
    """Return the folder of kept answers: `$LORAFIT_CACHE`, or `lorafit` in the user's cache folder."""
    named, home = os.environ.get("LORAFIT_CACHE"), os.environ.get("XDG_CACHE_HOME")
    return (Path(named) if named else (Path(home) if home else Path.home() / ".cache") / "lorafit") / "shapes"
