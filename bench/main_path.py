"""Which files and functions of lorafit `train` enters before its first optimizer step.

    python bench/main_path.py ROWS --base BASE --out RUN [--set key=value ...]     # prints one line a package

Bodies of classes and modules do not count: a file is entered when one of its functions runs.
"""

from __future__ import annotations

import collections
import json
import os
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import lorafit

ROOT = f"{Path(lorafit.__file__).parent}{os.sep}"
IS_FUNCTION = 0x2  # CO_NEWLOCALS: set for functions, not for the bodies of classes and modules
entered: collections.Counter[tuple[str, str]] = collections.Counter()


def note(frame: FrameType, event: str, _: Any) -> None:
    """Count a call of one of lorafit's functions."""
    code = frame.f_code
    if event == "call" and ROOT and str(code.co_filename).startswith(ROOT) and code.co_flags & IS_FUNCTION:
        entered[code.co_filename.removeprefix(ROOT), code.co_qualname] += 1


def report(*_: Any) -> None:
    """Print what was entered, and end the process: the first optimizer step is about to run."""
    sys.setprofile(None)
    functions: dict[str, int] = collections.Counter(file for file, _ in entered)
    packages: dict[str, list[str]] = collections.defaultdict(list)
    for file in sorted(functions):
        packages[Path(file).parts[0]].append(f"{file.partition(os.sep)[2] or file}({functions[file]})")
    for package, files in packages.items():
        print(f"{package} {len(files)}: {' '.join(files)}", file=sys.stderr)
    print(json.dumps({"files": len(functions), "functions": len(entered)}), file=sys.stderr, flush=True)
    os._exit(0)


def main() -> None:
    """Run `lorafit train` with the arguments given, watched."""
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    from lorafit.cli import main as program

    register_optimizer_step_pre_hook(report)
    sys.argv = ["lorafit", "train", *sys.argv[1:]]
    threading.setprofile(note)
    sys.setprofile(note)
    program()


if __name__ == "__main__":
    main()
