"""launched: errors and signals between a launcher and the processes that it started. No torch."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
from pathlib import Path

from lorafit.errors import LorafitError, ProcessLost

FOLDER = "LORAFIT_ERRORS"
"""Environment variable with the folder in which launched processes leave their errors."""
AGENT = "TORCHELASTIC_RUN_ID"
"""Environment variable of every process that torchrun starts."""
HEAD_START_S = 1.0
"""Seconds by which the end of a process comes after that of the one it lost, so that the launcher sees the cause."""
PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def leave_error(error: LorafitError) -> bool:
    """Leave `error` for the launcher to report. Return False in a process that lorafit did not launch."""
    folder = os.environ.get(FOLDER)
    if not folder:
        return False
    content = {
        "what": error.what,
        "where": error.where,
        "fix": error.fix,
        "label": error.label,
        "exit_code": error.exit_code,
        "is_lost": isinstance(error, ProcessLost),
    }
    Path(folder, os.environ["RANK"]).write_text(json.dumps(content))
    if isinstance(error, ProcessLost):
        time.sleep(HEAD_START_S)
    return True


def left_error(folder: Path) -> LorafitError | None:
    """Return the error that explains the end of the run whose processes left theirs in `folder`.

    A process that only lost another one explains nothing, unless all did. Process 0 comes before the others.
    """
    left = sorted((int(path.name), json.loads(path.read_text())) for path in folder.iterdir())
    if not left:
        return None
    rank, content = min(left, key=lambda one: (one[1]["is_lost"], one[0]))
    prefix = f"process {rank}: " if rank and not content["is_lost"] else ""
    error = LorafitError(prefix + content["what"], where=content["where"], fix=content["fix"])
    error.label, error.exit_code = content["label"], content["exit_code"]
    return error


def end_with_launcher() -> None:
    """Let the kernel send this process SIGTERM when its launcher is killed, so that none trains on alone."""
    if (os.environ.get(FOLDER) or AGENT in os.environ) and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM))
