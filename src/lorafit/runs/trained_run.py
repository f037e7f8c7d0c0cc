"""trained_run: the check that a finished run is the one that was trained, before another command relies on it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from lorafit.config.foreign_text import read_json
from lorafit.errors import AdapterError, RunDirError
from lorafit.runs.identity import RunIdentity, differing_settings, held_settings, with_defaults
from lorafit.runs.run_dir import RunDir
from lorafit.runs.seal import changed_file, file_hash

REPEAT = "repeat the train command, which restores it, or pass --restart to train again"
DOCUMENTS = (".md",)
"""Endings of files for people. They may be edited, and no command reads them."""


def adapter_hashes(folder: Path) -> dict[str, str]:
    """Return file name -> sha256 (hex) of every file in `folder` but DOCUMENTS. Raises OSError."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.suffix not in DOCUMENTS)
    return {path.name: file_hash(path) for path in files}


def require_trained_run(run: RunDir) -> RunIdentity:
    """Return the identity of `run`, once every file that is read of it has proved to be the trained one.

    Raises AdapterError for another adapter. Raises RunDirError for a damaged identity, for settings that are not the
    trained ones, and for another template or other held-out rows.
    """
    identity = RunIdentity.read(run.identity)
    changed = changed_file(run.adapter, identity.adapter)
    if changed is not None:
        what = f"the adapter has changed since training ({changed} differs)"
        raise AdapterError(what, where=str(run.adapter), fix=REPEAT)
    if not identity.adapter:
        what = "fingerprint.json has no hashes of the adapter, so nothing proves that it is the trained one"
        raise AdapterError(what, where=str(run.path), fix="repeat the train command, which compares and seals it")
    changed = changed_file(run.path, identity.files) or _other_template(run, identity)
    if changed is not None:
        raise RunDirError("the file has changed since training", where=str(run.path / changed), fix=REPEAT)
    _require_trained_settings(run, identity)
    return identity


def _other_template(run: RunDir, identity: RunIdentity) -> str | None:
    """Return the template's file name if its text is not the trained one: the only proof in an older release's run."""
    jinja: Any = read_json(run.template, RunDirError, fix=REPEAT, max_bytes=64 << 20).get("jinja")
    digest = hashlib.sha256(jinja.encode("utf-8", "surrogatepass")).hexdigest() if isinstance(jinja, str) else ""
    return None if digest == identity.fingerprint.template else run.template.name


def _require_trained_settings(run: RunDir, identity: RunIdentity) -> None:
    then, now = identity.fingerprint.settings, held_settings(run.config())
    for name, trained, found in differing_settings(with_defaults(then, now), now):
        raise RunDirError(
            f"the file says {name} = {found:.80}, but the run was trained with {trained:.80}",
            where=str(run.settings),
            fix=f"write {name} back",
        )
