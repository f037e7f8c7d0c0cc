"""leftovers: the files of a run that never began, known by their content and not by their names.

A new run writes over such files. Any other file belongs to somebody, and the folder is refused before it is touched.
"""

from __future__ import annotations

import hashlib
import json
import re
import stat
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

from lorafit.config.foreign_text import read_json
from lorafit.errors import LorafitError, RunDirError
from lorafit.runs.identity import RunIdentity

HEAD_BYTES = 1 << 20
PLAN_KEYS = {"method", "runnable", "reason", "decisions", "memory", "fits", "time_s", "steps"}
FINDING_KEYS = {"code", "severity", "message", "where", "examples"}
ROW_KEYS = {"messages", "source", "tools", "loss", "template_kwargs"}
ENGINE_KEYS = {"schedule", "attempts", "peak_bytes", "asked"}
LOGGED = re.compile(
    r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} [A-Z]+ "
    r"(transformers|bitsandbytes|peft|accelerate|datasets|huggingface_hub|torch|kernels|py\.warnings)\b"
)
DEMO_DATA = re.compile(r"[a-z]+-(train|held-out)\.jsonl")


def is_leftover(path: Path) -> bool:
    """Return True if `path` is a leftover of a run that never began. An empty file with one of our names counts."""
    try:
        status = path.lstat()
        if stat.S_ISDIR(status.st_mode):
            return path.name in FOLDERS and FOLDERS[path.name](path)
        if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
            return False
        name = path.name
        if name.startswith(".") and name.endswith(".staged"):
            return name[1:].removesuffix(".staged") in (*FILES, "run.yaml")
        return name in FILES and (status.st_size == 0 or FILES[name](path))
    except (OSError, LorafitError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False


def _is_template(path: Path) -> bool:
    saved = read_json(path, RunDirError)
    digest = hashlib.sha256(saved["jinja"].encode("utf-8", "surrogatepass")).hexdigest()
    return {"tokenizer_sha256", "stop_ids", "golden"} <= set(saved) and digest == saved["sha256"]


def _has_keys(keys: Collection[str]) -> Callable[[Path], bool]:
    return lambda path: set(keys) <= set(read_json(path, RunDirError))


def _is_base_note(path: Path) -> bool:
    return set(read_json(path, RunDirError)) == {"base", "revision", "fingerprint"}


def _is_identity(path: Path) -> bool:
    return bool(RunIdentity.read(path).run)


def _are_findings(path: Path) -> bool:
    found = json.loads(path.read_text(encoding="utf-8"))
    return isinstance(found, list) and all(set(one) >= FINDING_KEYS for one in found)


def _first_line(path: Path) -> str:
    with path.open("rb") as stream:
        return stream.readline(HEAD_BYTES).decode("utf-8", "replace")


def _first_has(*keys: str) -> Callable[[Path], bool]:
    return lambda path: set(keys) <= set(json.loads(_first_line(path)))


def _is_split(path: Path) -> bool:
    return _first_line(path) == "side\tsource\n"


def _are_kept_rows(path: Path) -> bool:
    # anybody's rows may have these keys; the template is always written before them
    row: dict[str, Any] = json.loads(_first_line(path))
    return {"messages", "source"} <= set(row) <= ROW_KEYS and _is_template(path.with_name("template.json"))


def _is_log(path: Path) -> bool:
    return LOGGED.match(_first_line(path)) is not None


def _is_owner(path: Path) -> bool:
    return set(read_json(path, RunDirError)) == {"pid", "host", "boot", "since", "command"}


def _is_lock(path: Path) -> bool:
    # empty where the kernel locks; on other disks a line with the process and the host
    return path.stat().st_size < 256 and _first_line(path).strip().isdigit()


def _is_empty_folder(path: Path) -> bool:
    return not any(path.iterdir())


def _is_demo_data(path: Path) -> bool:
    """Return True if every file is one that `lorafit demo` writes anew."""
    return all(
        DEMO_DATA.fullmatch(inner.name)
        and stat.S_ISREG(inner.lstat().st_mode)
        and (inner.stat().st_size == 0 or set(json.loads(_first_line(inner))) == {"instruction", "input", "response"})
        for inner in path.iterdir()
    )


FILES: dict[str, Callable[[Path], bool]] = {
    "plan.json": _has_keys(PLAN_KEYS),
    "findings.json": _are_findings,
    "engine.json": _has_keys(ENGINE_KEYS),
    "template.json": _is_template,
    "held-out.jsonl": _are_kept_rows,
    "base.json": _is_base_note,
    "fingerprint.json": _is_identity,
    "rejected.jsonl": _first_has("source", "code", "reason", "raw"),
    "split.tsv": _is_split,
    "events.jsonl": _first_has("step", "kind", "message", "unix_s"),
    "log.txt": _is_log,
    ".writable": lambda path: False,  # always empty
    ".lock": _is_lock,
    ".lock.json": _is_owner,
}
"""File name -> whether the content is lorafit's."""
FOLDERS: dict[str, Callable[[Path], bool]] = {"checkpoints": _is_empty_folder, "data": _is_demo_data}


def foreign_names(folder: Path) -> list[str]:
    """Return the names in `folder` that no run which never began has left, sorted."""
    with suppress(NotADirectoryError, FileNotFoundError):
        return [path.name for path in sorted(folder.iterdir()) if not is_leftover(path)]
    return []
