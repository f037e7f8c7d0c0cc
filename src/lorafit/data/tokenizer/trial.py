"""Trial: one bounded test of a tokenizer.json in a child (trial_worker.py), remembered on disk."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

from lorafit.config import one_line
from lorafit.data.bounded_child import child_environment, command_of
from lorafit.errors import BackboneError

WORKER = Path(__file__).with_name("trial_worker.py")
FORMAT = 1
"""Raise it when the trial asks for more."""
MAX_FILE_BYTES = 256 << 20
MAX_BYTES, BYTES_PER_BYTE = 2 << 30, 16
LOAD_S, TRY_S, WAIT_S = 30.0, 5.0, 120.0
FIX = "do not trust this base's tokenizer, or download the base again"


def require_bounded(path: Path, remembered: Path) -> None:
    """Raise BackboneError unless the tokenizer.json at `path` loads and encodes within bounds of time and memory.

    The folder `remembered` keeps a mark by content for one that does, so that the next start costs a hash alone.
    """
    try:
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise BackboneError(f"is larger than {MAX_FILE_BYTES >> 20} MiB", where=str(path), fix=FIX)
        with path.open("rb") as stream:
            content = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise BackboneError(f"cannot be read ({one_line(error)})", where=str(path), fix="check the file") from error
    mark = remembered / f"tried-{content}-{importlib.metadata.version('tokenizers')}-{FORMAT}"
    with suppress(OSError, ValueError):
        if mark.read_text(encoding="utf-8") == mark.name:
            return
    if reason := _fault(path, MAX_BYTES + BYTES_PER_BYTE * size):
        raise BackboneError(f"the tokenizer cannot be used ({reason})", where=str(path), fix=FIX)
    with suppress(OSError):  # what cannot be remembered is tried again
        mark.write_text(mark.name, encoding="utf-8")


def _fault(path: Path, max_bytes: int) -> str:
    """Return the fault of the tokenizer at `path`; empty if it has none."""
    command = command_of(WORKER, str(path.resolve()), str(max_bytes), str(LOAD_S), str(TRY_S))
    try:
        child = subprocess.run(
            command, env=child_environment(), stdin=subprocess.DEVNULL, capture_output=True, timeout=WAIT_S
        )
        return one_line(str(json.loads(child.stdout))) if child.stdout not in (b"", b'""') else _death(child.returncode)
    except subprocess.TimeoutExpired:
        return f"nothing within {WAIT_S:.0f} s"
    except OSError as error:
        return f"no process can be started to try it: {one_line(error)}"
    except ValueError:
        return "its process wrote no answer"


def _death(code: int) -> str:
    if code == 0:
        return ""
    if code == -signal.SIGPROF:
        return f"it does not end: more than {LOAD_S:.0f} s to load it, or {TRY_S:.0f} s for a few short texts"
    if code in (-signal.SIGABRT, -signal.SIGKILL, -signal.SIGSEGV):
        return f"more than {MAX_BYTES >> 30} GiB of memory"
    return f"its process died with code {code}"
