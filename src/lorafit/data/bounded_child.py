"""Bounded child: the command and environment of child processes that run untrusted templates and tokenizers."""

from __future__ import annotations

import os
import sys
from pathlib import Path

KEPT = ("PATH", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH")
"""What Python itself needs to start. Tokens, keys and the home folder stay with the parent."""


def command_of(worker: Path, *arguments: str) -> list[str]:
    """Return the command that runs the file `worker` in a Python of its own."""
    # -P: the worker's folder holds modules of ours that must not shadow anything
    return [sys.executable, "-P", str(worker), *arguments]


def child_environment() -> dict[str, str]:
    """Return the environment of a child: a locale, and the paths that Python needs."""
    # the C locale keeps a locale archive of 200 MB out of the address space
    return {key: os.environ[key] for key in KEPT if key in os.environ} | {"LC_ALL": "C", "PYTHONUTF8": "1"}
