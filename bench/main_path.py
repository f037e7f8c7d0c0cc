"""Which files and functions of lorafit `train` enters before its first optimizer step.

    python bench/main_path.py ROWS --base BASE --out RUN [--set key=value ...]     # prints one line a package

A file is entered when one of its functions runs, unless a module calls the function while it is imported. The data
cache is empty, so rows are read from their file.
"""

from __future__ import annotations

import collections
import json
import os
import sys
import tempfile
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import lorafit

ROOT = f"{Path(lorafit.__file__).parent}{os.sep}"
IS_FUNCTION = 0x2  # CO_NEWLOCALS: set for functions, not for the bodies of classes and modules
IMPORTER = "<frozen importlib._bootstrap>"
entered: collections.Counter[tuple[str, str]] = collections.Counter()


def note(frame: FrameType, event: str, _: Any) -> None:
    """Count a call of one of lorafit's functions."""
    code = frame.f_code
    if event != "call" or not str(code.co_filename).startswith(ROOT) or not code.co_flags & IS_FUNCTION:
        return
    function = code.co_filename.removeprefix(ROOT), code.co_qualname
    if function in entered or not within_import(frame):
        entered[function] += 1


def within_import(frame: FrameType | None) -> bool:
    """Return True if a module is being imported below `frame`."""
    while frame is not None and frame.f_code.co_filename != IMPORTER:
        frame = frame.f_back
    return frame is not None


def report(*_: Any) -> None:
    """Print what was entered, and end the process: the first optimizer step is about to run."""
    sys.setprofile(None)
    functions: dict[str, int] = collections.Counter(file for file, _ in entered)
    packages: dict[str, list[str]] = collections.defaultdict(list)
    for file in sorted(functions):
        packages[Path(file).parts[0]].append(f"{file.partition(os.sep)[2] or file}({functions[file]})")
    for package, files in packages.items():
        print(f"{package} {len(files)}: {' '.join(files)}", file=sys.stderr)
    lines = sum(len(Path(ROOT, file).read_text().splitlines()) for file in functions)
    totals = {"files": len(functions), "functions": len(entered), "lines": lines}
    print(json.dumps(totals), file=sys.stderr, flush=True)
    os._exit(0)


def main() -> None:
    """Run `lorafit train` with the arguments given, watched."""
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    from lorafit.cli import main as program

    register_optimizer_step_pre_hook(report)
    os.environ["LORAFIT_CACHE"] = tempfile.mkdtemp(prefix="main-path-")
    sys.argv = ["lorafit", "train", *sys.argv[1:]]
    threading.setprofile(note)
    sys.setprofile(note)
    program()


if __name__ == "__main__":
    main()
